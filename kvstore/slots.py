"""Which slots of the arena are leased, cached or free. Pure counting; who holds a pin is not known here.

free ──allocate──► leased ──last unpin──► free
                     ▲ │ retained: ──last unpin──► cached ──forget──► free
                     └─┴──────────pin───────────────┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class SlotAllocator:
    """Invariant: num_leased + num_cached + num_free = num_slots, each slot on one side only."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_leased = 0
        self.num_cached = 0
        self._free = deque(range(num_slots))
        self._pins = [0] * num_slots
        self._retained = [False] * num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_pins(self, slot: int) -> int:
        return self._pins[slot]

    def allocate(self, num_slots: int) -> list[int]:
        """Free slots, each with one pin; in ascending order, because a run of neighbours is one copy.

        Raises ValueError where fewer are free: the caller has to make room first.
        """
        if num_slots > len(self._free):
            raise ValueError(f"{num_slots} slots asked for, {len(self._free)} of {self.num_slots} are free")
        slots = sorted(self._free.popleft() for _ in range(num_slots))
        for slot in slots:
            self._pins[slot] = 1
        self.num_leased += num_slots
        return slots

    def claim(self, slots: Iterable[int]) -> None:
        """These very slots, all of them free, each with one pin."""
        claimed = set(slots)
        self._free = deque(slot for slot in self._free if slot not in claimed)
        for slot in claimed:
            self._pins[slot] = 1
        self.num_leased += len(claimed)

    def pin(self, slot: int) -> None:
        """One more holder. Raises ValueError for a free slot: nothing stands in it."""
        if self._pins[slot] == 0:
            if not self._retained[slot]:
                raise ValueError(f"slot {slot} is free; only allocate hands it out")
            self.num_cached -= 1
            self.num_leased += 1
        self._pins[slot] += 1

    def unpin(self, slot: int) -> bool:
        """One holder less; True where it was the last. Raises ValueError for a slot without a pin."""
        if self._pins[slot] == 0:
            raise ValueError(f"slot {slot} is unpinned once too often; somebody else may hold it by now")
        self._pins[slot] -= 1
        if self._pins[slot]:
            return False
        self.num_leased -= 1
        if self._retained[slot]:
            self.num_cached += 1
        else:
            self._free.append(slot)
        return True

    def retain(self, slot: int) -> None:
        """The pinned slot becomes cached, not free, after its last unpin."""
        if self._pins[slot] == 0:
            raise ValueError(f"slot {slot} is retained without a pin")
        self._retained[slot] = True

    def forget(self, slot: int) -> None:
        """The retained slot's content is given up: free at once, or after its last unpin."""
        if not self._retained[slot]:
            raise ValueError(f"slot {slot} is forgotten and was not retained")
        self._retained[slot] = False
        if self._pins[slot] == 0:
            self.num_cached -= 1
            self._free.append(slot)
