"""Memory that slices are received into, used again: a fresh page costs the kernel as much as a copy of it.

take ─► array ─► its last view is dropped ─► back in the pool
"""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np

MAX_IDLE_BYTES = 128 * 2**20
MIN_BYTES = 64 * 2**10


class ReceiveBuffers:
    """Any thread."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._lock = threading.RLock()  # a view may be collected while the lock is held
        self._idle: dict[int, list[mmap.mmap]] = {}  # by size
        self._num_idle_bytes = 0

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes], the caller's until it has dropped every view of it."""
        size = max(MIN_BYTES, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            idle = self._idle.get(size)
            memory = idle.pop() if idle else None
            if memory is not None:
                self._num_idle_bytes -= size
        if memory is None:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _give_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            if self._num_idle_bytes + len(memory) <= self._max_idle_bytes:
                self._idle.setdefault(len(memory), []).append(memory)
                self._num_idle_bytes += len(memory)
