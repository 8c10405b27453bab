"""The xxh3-64 of each of some blocks, fed layer by layer as the bytes come; large ones on a few threads beside the caller's.

block 0 4 8 … ─► lane 0      a block is always the same lane's, and a lane does one thing after the other:
block 1 5 9 … ─► lane 1      the layers of a block are hashed in the order in which they were added
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import xxhash

MAX_LANES = 8  # hash some 10 GB/s each, memory permitting
MIN_PARALLEL_BYTES = 2**20  # one layer of all blocks; for less, handing it to a thread costs more than hashing it


@cache
def lanes() -> tuple[ThreadPoolExecutor, ...]:
    """The process's. Half of the cores: the others have an engine to feed."""
    num_lanes = max(1, min(MAX_LANES, (os.cpu_count() or 1) // 2))
    return tuple(ThreadPoolExecutor(1, thread_name_prefix=f"checksums-{lane}") for lane in range(num_lanes))


class Checksums:
    """Not locked: one thread adds at a time."""

    def __init__(self, num_blocks: int, layer_bytes: int, threads: Sequence[ThreadPoolExecutor] | None = None) -> None:
        """threads: of one worker each; None: the process's where the blocks are large, otherwise the caller's own alone."""
        self._hashes = [xxhash.xxh3_64() for _ in range(num_blocks)]
        if threads is None:
            threads = lanes() if num_blocks * layer_bytes >= MIN_PARALLEL_BYTES else ()
        self._threads = threads
        self._under_way: list[Future[None]] = []

    def add(self, first_block: int, rows: Iterable[np.ndarray]) -> None:
        """The next layer of blocks from first_block on, uint8 [layer_bytes] each. They must stay as they are until it is over."""
        rows = list(rows)
        hashes = self._hashes[first_block : first_block + len(rows)]
        if not self._threads:
            _update(hashes, rows)
            return
        self._under_way = [future for future in self._under_way if not future.done()]
        num_lanes = len(self._threads)
        for start in range(min(num_lanes, len(rows))):
            lane = self._threads[(first_block + start) % num_lanes]
            self._under_way.append(lane.submit(_update, hashes[start::num_lanes], rows[start::num_lanes]))

    def update(self, first_block: int, rows: Iterable[np.ndarray]) -> None:
        """As add, on the caller's thread: for bytes that are in its core's cache."""
        rows = list(rows)
        self.wait()
        _update(self._hashes[first_block : first_block + len(rows)], rows)

    def wait(self) -> None:
        """Until everything added is hashed. Not on an event loop."""
        for future in self._under_way:
            future.result()
        self._under_way.clear()

    async def finished(self) -> None:
        """Waits without blocking the event loop until everything added is hashed."""
        await asyncio.gather(*map(asyncio.wrap_future, self._under_way))

    def digest(self, block: int) -> int:
        """The checksum of all that was added to the block; wait() or finished() has to come first."""
        return self._hashes[block].intdigest()


def _update(hashes: Sequence[xxhash.xxh3_64], rows: Sequence[np.ndarray]) -> None:
    for found, row in zip(hashes, rows, strict=True):
        found.update(row.data)
