"""Which blocks a store has on SSD alone: loading them takes longer than loading what is in its DRAM.

demoted ─► on SSD alone ─► promoted, stored anew or evicted ─► not
A store demotes the end of a chain before its start, so a run is DRAM first and SSD behind it, and bisection finds where. This may fail
for a while; then a load takes longer or shorter than predicted, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SsdBlocks:
    """By store address. About 100 bytes a block."""

    def __init__(self) -> None:
        self._keys: dict[str, set[bytes]] = {}  # stores without any are left out

    def __bool__(self) -> bool:
        return bool(self._keys)

    def replace(self, store: str, keys: Iterable[bytes]) -> None:
        self.drop(store)
        self.add(store, keys)

    def add(self, store: str, keys: Iterable[bytes]) -> None:
        found = self._keys.setdefault(store, set())
        found.update(keys)
        if not found:
            del self._keys[store]

    def remove(self, store: str, *gone: Iterable[bytes]) -> None:
        found = self._keys.get(store)
        if found is None:
            return
        found.difference_update(*gone)
        if not found:
            del self._keys[store]

    def drop(self, store: str) -> None:
        self._keys.pop(store, None)

    def num_behind(self, store: str, keys: Sequence[bytes], num_held: int) -> int:
        """Of the first num_held keys, which the store holds, those behind the last that stands in DRAM."""
        found = self._keys.get(store)
        if not found or num_held == 0 or keys[num_held - 1] not in found:
            return 0
        first, last = 0, num_held - 1
        while first < last:
            middle = (first + last) // 2
            if keys[middle] in found:
                last = middle
            else:
                first = middle + 1
        return num_held - first
