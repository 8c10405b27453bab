"""Which cached block goes when room is needed. Pure: the simulator runs the very same classes.

The policy holds the evictable keys only: a block leaves it while a lease pins it.

unpinned ──add──► [ oldest … newest ] ──evict──► gone
                         │ remove: pinned again, or dropped
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol

from ..protocol.errors import ConfigError


class EvictionPolicy(Protocol):
    def add(self, key: Hashable) -> None:
        """key may be evicted from now on; adding it again refreshes it."""
        ...

    def remove(self, key: Hashable) -> None:
        """key may not be evicted any more. Raises KeyError for a key that is not here."""
        ...

    def evict(self) -> Hashable:
        """Takes out the key to lose next. Raises KeyError where there is none."""
        ...

    def __len__(self) -> int: ...


class LRU:
    """The key that has been unpinned for the longest time goes first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, key: Hashable) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def remove(self, key: Hashable) -> None:
        del self._keys[key]

    def evict(self) -> Hashable:
        return self._keys.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._keys)


_POLICIES = {"lru": LRU}


def create_eviction_policy(name: str) -> EvictionPolicy:
    """Raises ConfigError for a name that is not known."""
    if name not in _POLICIES:
        raise ConfigError(f"store.eviction is {name!r}; it must be one of {', '.join(map(repr, _POLICIES))}")
    return _POLICIES[name]()
