"""The blocks that one node's store holds, in the store's own classes: slots, content index and eviction of kvstore/, without bytes.

prompt keys ──acquire──► longest leading run, pinned ──insert──► its new blocks found by key ──release──► evictable
                              DRAM ──evicted──► SSD ──evicted──► gone;   a hit on SSD is promoted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..kvstore.content import ContentIndex
from ..kvstore.eviction import create_eviction_policy
from ..kvstore.slots import SlotAllocator

Change = Callable[[list[bytes], list[bytes], list[bytes], list[bytes]], None]


class Run(NamedTuple):
    slots: list[int]  # DRAM slots, pinned until release
    num_ssd: int  # blocks behind them that stand on SSD only
    num_wanted: int  # that were asked for


class NodeCache:
    """on_change(stored, evicted, demoted, promoted): what can be found on this node, on either tier, and what moved between them."""

    def __init__(self, num_blocks: int, on_change: Change, *, num_ssd_blocks: int = 0, eviction: str = "lru") -> None:
        self._on_change = on_change
        self._eviction = eviction
        self.dram_slots = SlotAllocator(num_blocks)
        self.dram = ContentIndex(self.dram_slots, create_eviction_policy(eviction), self._dram_changed)
        self.ssd_slots = SlotAllocator(num_ssd_blocks)
        self.ssd = ContentIndex(self.ssd_slots, create_eviction_policy(eviction), self._ssd_changed)

    def acquire(self, keys: Sequence[bytes], *, from_ssd: bool = True) -> Run:
        slots = self.dram.find_run(keys)
        self.dram.pin(slots)
        num_ssd = len(self.ssd.find_run(keys[len(slots) :])) if from_ssd and self.ssd_slots.num_slots else 0
        return Run(slots, num_ssd, len(keys))

    def insert(self, keys: Sequence[bytes]) -> None:
        """All of keys stand here now; those that do not fit beside what is pinned are left out, from the end."""
        missing = [key for key in keys if self.dram.slot(key) is None]
        held = [slot for key in keys if (slot := self.dram.slot(key)) is not None]
        self.dram.pin(held)  # lest room for the end of the chain is made by evicting its start
        room = self.dram_slots.num_free + self.dram_slots.num_cached
        missing = missing[: max(room, 0)]
        slots = self.dram.allocate(len(missing)) if missing else None
        if slots is not None:
            self.dram.add((key, slot, 0) for key, slot in zip(missing, slots, strict=True))
        self.dram.unpin([*held, *(slots or [])])

    def release(self, run: Run) -> None:
        self.dram.unpin(run.slots)

    def clear(self) -> list[bytes]:
        """The node died. Returns what was held; on_change is not called."""
        keys = self.dram.keys() + self.ssd.keys()
        self.__init__(self.dram_slots.num_slots, self._on_change, num_ssd_blocks=self.ssd_slots.num_slots, eviction=self._eviction)
        return keys

    def _dram_changed(self, stored: list[bytes], evicted: list[bytes]) -> None:
        num_ssd = self.ssd_slots.num_slots
        if not num_ssd:
            self._on_change(stored, evicted, [], [])
            return
        if stored:
            self._on_change(stored, [], [], [key for key in stored if self.ssd.slot(key) is not None])
        if evicted:
            self._demote(evicted)

    def _demote(self, keys: list[bytes]) -> None:
        new = [key for key in keys if self.ssd.slot(key) is None]
        num = min(len(new), self.ssd_slots.num_slots)
        slots = self.ssd.allocate(num) or []
        self.ssd.add((key, slot, 0) for key, slot in zip(new[:num], slots, strict=True))
        self.ssd.unpin(slots)
        self._on_change([], new[num:], [key for key in keys if self.ssd.slot(key) is not None], [])

    def _ssd_changed(self, stored: list[bytes], evicted: list[bytes]) -> None:
        gone = [key for key in evicted if self.dram.slot(key) is None]
        if gone:
            self._on_change([], gone, [], [])
