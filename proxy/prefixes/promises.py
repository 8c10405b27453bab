"""Blocks that a store will hold soon, because a request placed there is computing or copying them.

add ─► open ─► confirmed block by block, as the store announces them
         ├─► withdrawn                                                    a block that is promised twice stays promised
         └─► too old, or too many: the oldest is dropped                  until both promises have ended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_BLOCKS = 262_144  # of all open promises together; some 300 bytes each
TTL_S = 120.0
PART_BLOCKS = 4096  # ended in one go, in some milliseconds


@dataclass(slots=True, eq=False)
class Promise:
    slot: int
    keys: Sequence[bytes]
    expires_s: float
    open: bool = True


class Promises:
    """Stores are numbers (slots) here. Pure except for the clock, which is read only when something may expire."""

    def __init__(self, clock: Callable[[], float], ttl_s: float = TTL_S, max_blocks: int = MAX_BLOCKS) -> None:
        self.stores: dict[bytes, int] = {}  # block key -> bit i: promised by the store at slot i
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._open: dict[int, dict[bytes, tuple[Promise, ...]]] = {}  # slot -> block key -> promises of it that are open
        self._by_age: deque[Promise] = deque()
        self._by_end: dict[tuple[int, bytes], list[Promise]] = {}

    def add(self, slot: int, keys: Sequence[bytes]) -> None:
        """keys: the end of a chain, not empty."""
        promise = Promise(slot, keys, self._clock() + self._ttl_s)
        self._by_age.append(promise)
        self._by_end.setdefault((slot, keys[-1]), []).append(promise)
        self._num_blocks += len(keys)
        found, stores, bit = self._open.setdefault(slot, {}), self.stores, 1 << slot
        if found.keys().isdisjoint(keys):  # mostly, and then it takes half of the time
            found.update(dict.fromkeys(keys, (promise,)))
        else:
            for key in keys:
                found[key] = (*found.get(key, ()), promise)
        if stores.keys().isdisjoint(keys):
            stores.update(dict.fromkeys(keys, bit))
        else:
            for key in keys:
                stores[key] = stores.get(key, 0) | bit
        while self._num_blocks > self._max_blocks:
            self._end(self._by_age[0])

    def withdraw(self, slot: int, last_key: bytes) -> None:
        """Ends the latest promise of the chain that ends in last_key. Does nothing if there is none."""
        found = self._by_end.get((slot, last_key))
        if found:
            self._end(found[-1])

    def confirm(self, slot: int, keys: Iterable[bytes]) -> None:
        """The store holds the keys now, so all promises of them end."""
        found = self._open.get(slot)
        if found:
            for key in keys:
                if found.pop(key, None):
                    self._clear(key, 1 << slot)

    def forget(self, slot: int) -> None:
        """The store is gone."""
        for promise in [found for found in self._by_age if found.slot == slot and found.open]:
            self._end(promise)
        self._open.pop(slot, None)

    def expire(self) -> None:
        """Ends what is too old, up to PART_BLOCKS and the promise that passes them; the next call goes on."""
        if self._by_age:
            now, least_blocks = self._clock(), self._num_blocks - PART_BLOCKS
            while self._by_age and self._by_age[0].expires_s <= now and self._num_blocks > least_blocks:
                self._end(self._by_age[0])

    def _end(self, promise: Promise) -> None:
        keys, promise.keys = promise.keys, ()
        promise.open = False
        self._num_blocks -= len(keys)
        ending_alike = self._by_end[promise.slot, keys[-1]]
        ending_alike.remove(promise)
        if not ending_alike:
            del self._by_end[promise.slot, keys[-1]]
        while self._by_age and not self._by_age[0].open:
            self._by_age.popleft()
        found = self._open[promise.slot]
        for key in keys:
            others = found.get(key)
            if others is None or promise not in others:
                continue  # confirmed since
            if len(others) == 1:
                del found[key]
                self._clear(key, 1 << promise.slot)
            else:
                found[key] = tuple(other for other in others if other is not promise)

    def _clear(self, key: bytes, bit: int) -> None:
        left = self.stores[key] & ~bit
        if left:
            self.stores[key] = left
        else:
            del self.stores[key]
