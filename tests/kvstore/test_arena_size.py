from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

import halfmoon.kvstore.arena_size as module
from halfmoon.kvstore.arena_size import arena_size
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.schema import KVSchema

SCHEMA = KVSchema(model_fingerprint="f", dtype="float16", num_layers=2, num_kv_heads=1, head_dim=8, block_size=4)
BLOCK_BYTES = 2 * 2 * 4 * 8 * 2  # layers, K and V, tokens, head_dim, bytes


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def set_free(shm: int, memory: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=shm, f_frsize=1))
        monkeypatch.setattr(module, "available_bytes", lambda: memory)

    return set_free


@pytest.mark.parametrize(
    ("shm", "memory", "expected"),
    [
        (10**9, 10**9, 64 * 3 * BLOCK_BYTES),  # 10 tokens are 3 blocks of 4
        (100 * BLOCK_BYTES, 10**9, 50 * BLOCK_BYTES),
        (10**9, 60 * BLOCK_BYTES, 30 * BLOCK_BYTES),
    ],
)
def test_an_arena_holds_64_prompts_or_half_of_what_is_free(free, shm: int, memory: int, expected: int) -> None:
    free(shm, memory)
    found = arena_size(StoreConfig(), SCHEMA, 10)
    assert (found.num_bytes, found.num_tokens, found.is_set) == (expected, expected // BLOCK_BYTES * 4, False)


def test_a_number_in_the_configuration_holds_whatever_is_free(free) -> None:
    free(1, 1)
    assert arena_size(StoreConfig(arena_bytes=1000), SCHEMA, 10) == (1000, 1000 // BLOCK_BYTES * 4, True)


def test_a_store_that_knows_no_model_asks_for_a_number() -> None:
    for schema, max_model_len in ((None, 10), (SCHEMA, 0)):
        with pytest.raises(ConfigError, match=r"store\.arena_bytes is 0"):
            arena_size(StoreConfig(), schema, max_model_len)
