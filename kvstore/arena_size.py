"""How large an arena is where nobody says: room for the hand-offs and the conversations of one node, and half of what is free at most."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..protocol.blocks import div_ceil
from ..protocol.config import StoreConfig
from ..protocol.errors import ConfigError
from ..protocol.memory import SHM, available_bytes
from ..protocol.schema import KVSchema

NUM_PROMPTS = 64  # of max_model_len
SHARE = 0.5  # of what is free: the rest is for weights, pages, and for stores of other clusters


class ArenaSize(NamedTuple):
    num_bytes: int  # for slots
    num_tokens: int
    is_set: bool  # by the configuration


def arena_size(config: StoreConfig, schema: KVSchema | None, max_model_len: int, folder: Path = SHM) -> ArenaSize:
    """The arena of a store on this machine.

    max_model_len: tokens of prompt and answer together; 0 where nobody knows.
    Raises ConfigError where neither the configuration nor a model says how large it is.
    """
    num_bytes = config.arena_bytes
    if num_bytes == 0:
        if schema is None or max_model_len <= 0:
            raise ConfigError("store.arena_bytes is 0, so the model sizes the arena, and this store knows none; give it a number of bytes")
        wanted = NUM_PROMPTS * div_ceil(max_model_len, schema.block_size) * schema.block_bytes
        num_bytes = min(wanted, int(SHARE * free_shm_bytes(folder)), int(SHARE * available_bytes()))
    num_tokens = 0 if schema is None else num_bytes // schema.block_bytes * schema.block_size
    return ArenaSize(num_bytes, num_tokens, is_set=config.arena_bytes > 0)


def free_shm_bytes(folder: Path = SHM) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
