"""What the Conductor sees of all members, as columns. Each member has a row, which is written when something changed.

Member changes ─► its row is stale ─► the next pool() reads it once ─► columns ─► Pool, a copy
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..conductor.backlog import TaskTable
from ..conductor.pool import Ints, Pool, Roster

FIRST_SIZE = 64


class LoadRow(NamedTuple):
    """One member's load; the fields are MemberState's."""

    num_outstanding_tokens: int
    kv_capacity_tokens: int
    num_requests: int
    num_running: int
    num_running_tokens: int


class LoadTable:
    def __init__(self) -> None:
        self.tasks = TaskTable()
        self._values: Ints = np.zeros((len(LoadRow._fields), FIRST_SIZE), np.int64)
        self._free = list(range(FIRST_SIZE))[::-1]
        self._read: dict[int, Callable[[], LoadRow]] = {}
        self._stale: set[int] = set()

    @property
    def size(self) -> int:
        """Rows, free ones included."""
        return self._values.shape[1]

    def enter(self, read: Callable[[], LoadRow]) -> int:
        """Takes a free row. read gives its content."""
        if not self._free:
            size = self.size
            self._free = list(range(size, 2 * size))[::-1]
            self._values = np.concatenate((self._values, np.zeros_like(self._values)), axis=1)
        row = self._free.pop()
        self._read[row] = read
        self._stale.add(row)
        return row

    def changed(self, row: int) -> None:
        self._stale.add(row)

    def leave(self, row: int) -> None:
        """Frees the row. Changes to it do nothing until it is taken again."""
        if self._read.pop(row, None) is not None:
            self._free.append(row)

    def pool(self, roster: Roster, rows: Ints) -> Pool:
        """The roster's members, which stand in these rows, without waiting prefills: those are in TaskTable."""
        self._refresh()
        tokens, capacity, requests, running, running_tokens = self._values.take(rows, axis=1)
        none = np.zeros(len(rows))
        return Pool(roster, tokens, capacity, none, requests, running, running_tokens, none, none, none)

    def outstanding_tokens(self, rows: Ints) -> Ints:
        self._refresh()
        return self._values[0].take(rows)

    def _refresh(self) -> None:
        if not self._stale:
            return
        for row in self._stale:
            if (read := self._read.get(row)) is not None:
                self._values[:, row] = read()
        self._stale.clear()
