"""What the arena holds under block keys: key -> slot, pins, eviction.

add(key, slot) ─► found by key ─► pinned by leases ─► unpinned: evictable ─► evicted when room is needed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from .eviction import EvictionPolicy
from .slots import SlotAllocator


class ContentIndex:
    """Invariant: a key is in the eviction policy exactly while its slot is cached (has no pin)."""

    def __init__(self, slots: SlotAllocator, policy: EvictionPolicy, on_change: Callable[[list[bytes], list[bytes]], None]) -> None:
        """on_change(stored keys, evicted keys) is called after every change of what can be found."""
        self._slots = slots
        self._policy = policy
        self._on_change = on_change
        self._slot_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._checksums: dict[int, int] = {}
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._slot_of)

    def keys(self) -> list[bytes]:
        return list(self._slot_of)

    def slot(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def holds(self, key: bytes) -> bool:
        return key in self._slot_of

    def checksum(self, slot: int) -> int:
        """xxh3-64 of a cached slot's bytes."""
        return self._checksums[slot]

    def find_run(self, keys: Sequence[bytes]) -> list[int]:
        """The slots of the longest run of leading keys."""
        slots: list[int] = []
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def allocate(self, num_slots: int) -> list[int] | None:
        """Slots with one pin each, evicting what is needed; None, and nothing evicted, where there is no room."""
        if num_slots > self._slots.num_free + len(self._policy):
            return None
        evicted: list[bytes] = []
        while self._slots.num_free < num_slots:
            key = cast(bytes, self._policy.evict())
            self._slots.forget(self._remove(key))
            evicted.append(key)
        self.num_evicted += len(evicted)
        if evicted:
            self._on_change([], evicted)
        return self._slots.allocate(num_slots)

    def key(self, slot: int) -> bytes:
        """Of a slot that is found by its key."""
        return self._key_of[slot]

    def pin_coldest(self, max_slots: int) -> list[int]:
        """The slots that would be evicted next, pinned, in that order. let_go has to follow."""
        slots: list[int] = []
        while len(slots) < max_slots and len(self._policy):
            slot = self._slot_of[cast(bytes, self._policy.evict())]
            self._slots.pin(slot)
            slots.append(slot)
        return slots

    def let_go(self, slots: Sequence[int]) -> None:
        """Slots of pin_coldest: those that nobody else has pinned meanwhile are evicted."""
        evicted: list[bytes] = []
        for slot in slots:
            if self._slots.num_pins(slot) == 1 and slot in self._key_of:
                evicted.append(self._key_of[slot])
                self._remove(evicted[-1])
                self._slots.forget(slot)
                self._slots.unpin(slot)
            else:
                self.unpin([slot])
        if evicted:
            self._on_change([], evicted)

    def pin(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if self._slots.num_pins(slot) == 0:
                self._policy.remove(self._key_of[slot])
            self._slots.pin(slot)

    def unpin(self, slots: Sequence[int]) -> None:
        """slots: of a chain, from its start."""
        # last block first: the end of a chain is older than its start, so that eviction never cuts a chain in its middle
        for position in reversed(range(len(slots))):
            slot = slots[position]
            if self._slots.unpin(slot) and slot in self._key_of:
                self._policy.add(self._key_of[slot], position, len(slots))

    def add(self, blocks: Iterable[tuple[bytes, int, int]]) -> None:
        """(key, pinned slot, checksum): found by key from now on. The first slot of a key wins, a duplicate stays nameless."""
        stored: list[bytes] = []
        for key, slot, checksum in blocks:
            if key in self._slot_of:
                continue
            self._slot_of[key] = slot
            self._key_of[slot] = key
            self._checksums[slot] = checksum
            self._slots.retain(slot)
            stored.append(key)
        if stored:
            self._on_change(stored, [])

    def drop(self, slots: Iterable[int]) -> None:
        """Pinned slots whose bytes turned out wrong: nobody finds them any more."""
        dropped: list[bytes] = []
        for slot in slots:
            key = self._key_of.get(slot)
            if key is not None:
                self._remove(key)
                self._policy.forget(key)
                self._slots.forget(slot)
                dropped.append(key)
        if dropped:
            self._on_change([], dropped)

    def _remove(self, key: bytes) -> int:
        slot = self._slot_of.pop(key)
        del self._key_of[slot]
        del self._checksums[slot]
        return slot
