"""Prefixes that stand in an instance's pages after their request: what is there needs no load. Pages that someone needs are taken, oldest
first.

prefill done, decode done ─keep─► blocks by key, the least recently used first out ─num_leading─► of a prompt
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ..engine.page_allocator import PageAllocator


class PagePrefixes:
    """One process's. allocator: its pages; the free ones are those that old blocks may stand in."""

    def __init__(self, allocator: PageAllocator, page_size: int, block_size: int) -> None:
        self._allocator = allocator
        self._pages_per_block = max(block_size // page_size, 1)
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def keep(self, keys: Sequence[bytes]) -> None:
        """The request that had them has ended here."""
        for key in reversed(keys):  # a chain is evicted from its end
            self._keys[key] = None
            self._keys.move_to_end(key)
        self._evict()

    def num_leading(self, keys: Sequence[bytes]) -> int:
        """Of keys, blocks that stand in pages; they count as used."""
        if not self._keys or not keys or keys[0] not in self._keys:
            return 0
        self._evict()
        held = self._keys
        num = next((at for at, key in enumerate(keys) if key not in held), len(keys))
        for key in reversed(keys[:num]):
            held.move_to_end(key)
        return num

    def _evict(self) -> None:
        room = self._allocator.num_free // self._pages_per_block
        while len(self._keys) > room:
            self._keys.popitem(last=False)
