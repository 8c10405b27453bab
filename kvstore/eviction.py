"""Which cached block goes when room is needed. Pure: the simulator runs the very same classes.

The policy holds the evictable keys only: a block leaves it while a lease pins it.

unpinned ──add──► [ least worth … most worth ] ──evict──► gone
                         │ remove: pinned again, and soon added once more      forget: dropped for good

Every policy gives up the end of a chain before its start. A run is added from its end, and whoever uses a block uses all blocks before it:
a block was used at least as often and as lately as the blocks behind it, and is worth at least as much.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol

from ..protocol.errors import ConfigError

# Tokens of a prefix from which on attention costs as much as all else: 2 P = 2 n d L for P = 8e9 parameters, width d = 4096, L = 32 layers.
BALANCE_TOKENS = 60_000


class EvictionPolicy(Protocol):
    def add(self, key: Hashable, position: int = 0, run_len: int = 1) -> None:
        """key was used and may be evicted from now on; adding it again refreshes it.

        position: of the block in its chain. run_len: blocks of the chain that were used together.
        """
        ...

    def remove(self, key: Hashable) -> None:
        """key may not be evicted any more; its uses are remembered. Raises KeyError for a key that is not here."""
        ...

    def forget(self, key: Hashable) -> None:
        """A removed key that does not come back."""
        ...

    def evict(self) -> Hashable:
        """Takes out the key to lose next. Raises KeyError where there is none."""
        ...

    def __len__(self) -> int: ...


class LRU:
    """The key that has been unpinned for the longest time goes first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, key: Hashable, position: int = 0, run_len: int = 1) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def remove(self, key: Hashable) -> None:
        del self._keys[key]

    def forget(self, key: Hashable) -> None:
        pass

    def evict(self) -> Hashable:
        return self._keys.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._keys)


class RankedPolicy:
    """The key of the lowest rank goes first; among equals the one unpinned for the longest time. A subclass says rank."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[float, float, int]] = {}  # of what may be evicted
        self._heap: list[tuple[tuple[float, float, int], Hashable]] = []  # with entries that no longer hold
        self._worth: dict[Hashable, float] = {}  # also of pinned keys
        self._num_added = 0

    def rank(self, worth: float, position: int, run_len: int) -> tuple[float, float, float]:
        """(what the block is worth from now on, then two numbers to rank by). worth: so far; 0 for a new block."""
        raise NotImplementedError

    def evicted(self, rank: float) -> None:
        """The first number of what was evicted."""

    def add(self, key: Hashable, position: int = 0, run_len: int = 1) -> None:
        worth, first, second = self.rank(self._worth.get(key, 0.0), position, run_len)
        self._worth[key] = worth
        self._num_added += 1
        self._entries[key] = entry = (first, second, self._num_added)
        heapq.heappush(self._heap, (entry, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(entry, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)

    def remove(self, key: Hashable) -> None:
        del self._entries[key]

    def forget(self, key: Hashable) -> None:
        self._worth.pop(key, None)

    def evict(self) -> Hashable:
        if not self._entries:
            raise KeyError("nothing can be evicted")
        while True:
            entry, key = heapq.heappop(self._heap)
            if self._entries.get(key) == entry:
                break
        del self._entries[key], self._worth[key]
        self.evicted(entry[0])
        return key

    def __len__(self) -> int:
        return len(self._entries)


class LFU(RankedPolicy):
    """The key with the fewest uses goes first."""

    def rank(self, worth: float, position: int, run_len: int) -> tuple[float, float, float]:
        return worth + 1, worth + 1, 0.0


class LengthAware(RankedPolicy):
    """As LFU; among equally used blocks the one that stands furthest back in its chain goes first."""

    def rank(self, worth: float, position: int, run_len: int) -> tuple[float, float, float]:
        return worth + 1, worth + 1, -float(position)


class Cost(RankedPolicy):
    """The key whose uses saved the least time of prefill a byte goes first; what was worth much once grows old.

    A use of a run of k blocks saves what k blocks take to compute, which grows with the square of k, and each of the k blocks has an
    equal part in it. Age as in GreedyDual: a use begins at the rank of what was evicted last.
    """

    def __init__(self, block_tokens: int = 64) -> None:
        super().__init__()
        self._growth = block_tokens / BALANCE_TOKENS
        self._floor = 0.0

    def rank(self, worth: float, position: int, run_len: int) -> tuple[float, float, float]:
        worth += 1 + self._growth * run_len
        return worth, self._floor + worth, 0.0

    def evicted(self, rank: float) -> None:
        self._floor = rank


EVICTION_POLICIES = {"lru": LRU, "lfu": LFU, "length_aware": LengthAware, "cost": Cost}


def create_eviction_policy(name: str) -> EvictionPolicy:
    """Raises ConfigError for a name that is not known."""
    if name not in EVICTION_POLICIES:
        raise ConfigError(f"store.eviction is {name!r}; it must be one of {', '.join(map(repr, EVICTION_POLICIES))}")
    return EVICTION_POLICIES[name]()
