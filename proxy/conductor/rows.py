"""Numbers by key in dense columns. They change row by row and are read as a whole.

put ─► row n          remove ─► the last row fills the gap, so rows have no order          columns ─► arrays over all rows
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

Key = TypeVar("Key", bound=Hashable)
FIRST_SIZE = 64


class Rows(Generic[Key]):
    def __init__(self, *types: DTypeLike) -> None:
        """types: one for each column."""
        self._columns: list[NDArray[Any]] = [np.zeros(FIRST_SIZE, kind) for kind in types]
        self._keys: list[Key] = []
        self._row_of: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        return key in self._row_of

    def columns(self) -> list[NDArray[Any]]:
        """A view of each column, valid until the next change."""
        num = len(self._keys)
        return [column[:num] for column in self._columns]

    def put(self, key: Key, *values: float) -> None:
        """Sets one value for each column. A known key keeps its row."""
        row = self._row_of.get(key)
        if row is None:
            row = self._row_of[key] = len(self._keys)
            self._keys.append(key)
            if row == len(self._columns[0]):
                self._columns = [np.resize(column, 2 * row) for column in self._columns]
        for column, value in zip(self._columns, values, strict=True):
            column[row] = value

    def get(self, key: Key, column: int) -> float:
        """Raises KeyError."""
        return self._columns[column][self._row_of[key]].item()

    def remove(self, key: Key) -> bool:
        """True if the key was there."""
        row = self._row_of.pop(key, None)
        if row is None:
            return False
        last = self._keys.pop()
        if last is not key and last != key:
            self._keys[row] = last
            self._row_of[last] = row
            for column in self._columns:
                column[row] = column[len(self._keys)]
        return True
