"""What the stores hold, as events in the form that vLLM publishes and its routers and Dynamo's read. Pure; kv_event_sockets.py sends them.

prompt known (key ─► parent, tokens) ─┐
the first store holds a block ────────┴─► ["BlockStored", hashes, parent hash, token ids, block size, LoRA id, medium]
the last one holds it no more ──────────► ["BlockRemoved", hashes, medium]        arrays, as vLLM's msgspec structs with array_like are
A hash is the first 8 bytes of the block's key, as an unsigned number. A block whose tokens this proxy has never seen (it stood on an SSD
from before) is told when a prompt brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

MEDIUM = "CPU"  # vLLM's word for all that is no GPU; blocks that have cooled to SSD count, too
MAX_UNSTORED = 65_536  # blocks whose tokens are kept until a store holds them; some 700 bytes each of 64 tokens
PART_BLOCKS = 256  # of one event: a millisecond of the event loop
CLEARED = ["AllBlocksCleared"]
Event = list[Any]


def block_hash(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


class BlockEvents:
    def __init__(self, block_size: int, is_held: Callable[[bytes], bool], max_unstored: int = MAX_UNSTORED) -> None:
        """is_held: by any store now."""
        self._block_size = block_size
        self._is_held = is_held
        self._max_unstored = max_unstored
        self._told: set[bytes] = set()  # as stored
        self._unstored: dict[bytes, tuple[bytes | None, Sequence[int]]] = {}  # key -> parent's key, tokens; the oldest first

    def know(self, keys: Sequence[bytes], token_ids: Sequence[int]) -> Iterator[Event]:
        """A chain from its start, with the tokens of its blocks and perhaps more. An event at a time, so that others may be served."""
        size = self._block_size
        for first in range(0, len(keys), PART_BLOCKS):
            found: list[bytes] = []
            for index, key in enumerate(keys[first : first + PART_BLOCKS], first):
                if key not in self._told:
                    self._unstored.pop(key, None)
                    self._unstored[key] = (keys[index - 1] if index else None, token_ids[index * size : (index + 1) * size])
                    if self._is_held(key):
                        found.append(key)
            yield from self._stored(found)
        while len(self._unstored) > self._max_unstored:
            del self._unstored[next(iter(self._unstored))]

    def changed(self, new: Sequence[bytes], gone: Sequence[bytes]) -> Iterator[Event]:
        """new: held by a store, and by none before. gone: held by none any more. A key in both is held."""
        removed = [key for key in set(gone).difference(new) if key in self._told]
        self._told.difference_update(removed)
        if removed:
            yield ["BlockRemoved", [block_hash(key) for key in removed], MEDIUM]
        yield from self._stored(new)

    def _stored(self, keys: Iterable[bytes]) -> Iterator[Event]:
        """One event for each run of a chain."""
        run: list[bytes] = []
        first_parent: bytes | None = None
        token_ids: list[int] = []
        for key in keys:
            known = self._unstored.pop(key, None)
            if known is None:
                continue
            parent, tokens = known
            if run and (parent != run[-1] or len(run) == PART_BLOCKS):
                yield self._event(run, first_parent, token_ids)
                run, token_ids = [], []
            if not run:
                first_parent = parent
            run.append(key)
            token_ids += tokens
            self._told.add(key)
        if run:
            yield self._event(run, first_parent, token_ids)

    def _event(self, run: Sequence[bytes], parent: bytes | None, token_ids: list[int]) -> Event:
        before = None if parent is None else block_hash(parent)
        return ["BlockStored", [block_hash(key) for key in run], before, token_ids, self._block_size, None, MEDIUM]
