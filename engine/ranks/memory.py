"""Host memory that all ranks of a worker map: the arenas of stores, and a buffer of the worker's own for bytes that stand in none.

rank 0: a row's address ─► Place (memory, offset, rows, stride) ─► the same row in another rank's mapping
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

BUFFER = 0  # the number of the worker's own memory; arenas follow
BUFFER_BYTES = 32 * 2**20


class Place(NamedTuple):
    """uint8 [num_rows, …], rows stride bytes apart."""

    memory: int
    offset: int
    num_rows: int
    stride: int


def create_buffer(num_bytes: int) -> int:
    """A file without a name, open until its handle is closed."""
    handle = os.memfd_create("halfmoon-ranks")
    os.ftruncate(handle, num_bytes)
    return handle


class SharedMemory:
    """Any thread; a memory is added before its rows are used, and removed after."""

    def __init__(self, buffer: int) -> None:
        """buffer: handle of create_buffer's file, which is the caller's."""
        self._held: dict[int, np.ndarray] = {BUFFER: _mapped(buffer)}

    @property
    def buffer(self) -> np.ndarray:
        """uint8 [BUFFER_BYTES]"""
        return self._held[BUFFER]

    def add(self, number: int, memory: np.ndarray) -> None:
        """uint8, contiguous."""
        self._held[number] = memory.reshape(-1)

    def open(self, number: int, path: str, offset: int, num_bytes: int) -> np.ndarray:
        """Maps num_bytes of a file from offset on. Raises OSError, ValueError where that is not there."""
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.add(number, _mapped(handle)[offset:][:num_bytes])
        finally:
            os.close(handle)
        if self._held[number].nbytes != num_bytes:
            raise ValueError(f"{path} is shorter than {offset} + {num_bytes} bytes")
        return self._held[number]

    def number_of(self, memory: np.ndarray) -> int | None:
        """Under which it was added; None: it was not."""
        return next((number for number, held in self._held.items() if _address(held) == _address(memory)), None)

    def remove(self, number: int) -> np.ndarray | None:
        """Returns it, where it was held."""
        return self._held.pop(number, None)

    def places(self, runs: Iterable[np.ndarray]) -> list[Place] | None:
        """Of uint8 [rows, bytes] each; None where one stands in none of the memories."""
        found = [self._place(run) for run in runs]
        return None if None in found else [place for place in found if place is not None]

    def rows(self, place: Place, row_bytes: int) -> np.ndarray:
        """uint8 [num_rows, row_bytes], a view. Raises ValueError for a place outside."""
        held = self._held[place.memory]
        end = place.offset + (place.num_rows - 1) * place.stride + row_bytes
        if place.offset < 0 or end > held.nbytes:
            raise ValueError(f"{place} with rows of {row_bytes} bytes: the memory has {held.nbytes}")
        return np.lib.stride_tricks.as_strided(held[place.offset :], (place.num_rows, row_bytes), (place.stride, 1))

    def _place(self, run: np.ndarray) -> Place | None:
        address = _address(run)
        for number, held in list(self._held.items()):
            offset = address - _address(held)
            if 0 <= offset < held.nbytes:
                return Place(number, offset, len(run), run.strides[0])
        return None


def _mapped(handle: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(handle, 0), dtype=np.uint8)


def _address(memory: np.ndarray) -> int:
    return memory.__array_interface__["data"][0]
