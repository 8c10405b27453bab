"""Which store holds which block: block key -> stores, as the stores' Watch streams tell it.

key ─► 0b0101        bit i: the store at slot i holds it. Longest leading run of a store: how far its bit stays set.
A store holds no more blocks than its arena has slots, and so does its share of this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Plain ints and bytes; no I/O, so that the simulator holds one too."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._slots: dict[str, int] = {}  # store address -> its bit's position

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._holders)

    def replace(self, store: str, keys: Iterable[bytes]) -> None:
        """The store's whole content, whatever was known before."""
        self.drop(store)
        self.change(store, stored=keys, evicted=())

    def change(self, store: str, stored: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """A key that is in both is held afterwards."""
        bit = 1 << self._slot(store)
        self._clear(bit, evicted)
        holders = self._holders
        for key in stored:
            holders[key] = holders.get(key, 0) | bit

    def drop(self, store: str) -> None:
        """The store is gone, or what it holds is not known any more."""
        slot = self._slots.pop(store, None)
        if slot is not None:
            bit = 1 << slot
            self._clear(bit, [key for key, held in self._holders.items() if held & bit])

    def leading_runs(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Store address -> number of leading keys that it holds; stores that hold none are left out."""
        runs: dict[str, int] = {}
        held = -1  # by all the keys so far
        for num_blocks, key in enumerate(keys):
            still = held & self._holders.get(key, 0)
            if num_blocks and still != held:
                self._note(runs, held & ~still, num_blocks)
            held = still
            if not held:
                break
        if held > 0:
            self._note(runs, held, len(keys))
        return runs

    def _note(self, runs: dict[str, int], bits: int, num_blocks: int) -> None:
        for store, slot in self._slots.items():
            if bits >> slot & 1:
                runs[store] = num_blocks

    def _clear(self, bit: int, keys: Iterable[bytes]) -> None:
        for key in keys:
            left = self._holders.get(key, 0) & ~bit
            if left:
                self._holders[key] = left
            else:
                self._holders.pop(key, None)

    def _slot(self, store: str) -> int:
        if store not in self._slots:
            taken = set(self._slots.values())
            self._slots[store] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        return self._slots[store]
