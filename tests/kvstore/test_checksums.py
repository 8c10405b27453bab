"""Checksums against xxhash over each whole block."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from halfmoon.kvstore import checksums
from halfmoon.kvstore.checksums import Checksums

NUM_LAYERS, LAYER_BYTES = 5, 4096


@pytest.fixture(params=[0, 1, 3, 8])
def threads(request: pytest.FixtureRequest):
    made = [ThreadPoolExecutor(1) for _ in range(request.param)]
    yield made
    for executor in made:
        executor.shutdown()


@pytest.mark.parametrize("num_blocks", [1, 7, 20])
async def test_threads_give_the_checksums_of_whole_blocks(threads: list[ThreadPoolExecutor], num_blocks: int) -> None:
    """Layers in runs of other blocks each, all added before any need be hashed."""
    blocks = np.random.default_rng(num_blocks).integers(0, 256, (num_blocks, NUM_LAYERS, LAYER_BYTES), dtype=np.uint8)
    found = Checksums(num_blocks, LAYER_BYTES, threads)
    for layer in range(NUM_LAYERS):
        for first in range(0, num_blocks, layer + 2):
            found.add(first, blocks[first : first + layer + 2, layer])
    await found.finished()
    expected = [xxhash.xxh3_64_intdigest(block.tobytes()) for block in blocks]
    assert [found.digest(block) for block in range(num_blocks)] == expected


def test_wait_returns_when_everything_added_is_hashed(threads: list[ThreadPoolExecutor]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, 2**20), dtype=np.uint8)
    found = Checksums(6, 2**20, threads)
    found.add(0, rows)
    found.wait()
    kept = rows.copy()
    rows[:] = 0
    assert [found.digest(block) for block in range(6)] == [xxhash.xxh3_64_intdigest(row.tobytes()) for row in kept]


def test_small_blocks_are_hashed_where_they_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[ThreadPoolExecutor, ...]:
        raise AssertionError("threads for a few bytes")

    monkeypatch.setattr(checksums, "lanes", none)
    found = Checksums(3, 100)
    found.add(1, [np.full(100, 7, np.uint8)])
    assert found.digest(1) == xxhash.xxh3_64_intdigest(bytes([7] * 100)) and found.digest(0) == xxhash.xxh3_64_intdigest(b"")
