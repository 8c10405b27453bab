"""Tells watchers what a store holds: a snapshot, then every change, numbered without gaps.

publish(n) ─► watcher 1  [n-1, n] ─► its stream
           ─► watcher 2  too far behind: queue dropped, a snapshot instead
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

MAX_PENDING_KEYS = 65_536


class Change(NamedTuple):
    sequence: int
    snapshot: bool  # stored is the whole content
    stored: list[bytes]
    evicted: list[bytes]  # held on no tier any more
    demoted: Sequence[bytes] = ()  # held on SSD alone from now on; in a snapshot those of stored that are
    promoted: Sequence[bytes] = ()  # held in DRAM again

    @property
    def num_keys(self) -> int:
        return len(self.stored) + len(self.evicted) + len(self.demoted) + len(self.promoted)


class WatchFeed:
    def __init__(
        self,
        content: Callable[[], list[bytes]],
        max_pending_keys: int = MAX_PENDING_KEYS,
        demoted: Callable[[], list[bytes]] = list,
    ) -> None:
        """content: all keys held now. demoted: those on SSD alone. max_pending_keys bounds what waits for one slow watcher."""
        self._content = content
        self._demoted = demoted
        self._max_pending_keys = max_pending_keys
        self._watchers: set[Watcher] = set()
        self.sequence = 0

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def publish(self, stored: list[bytes], evicted: list[bytes], demoted: Sequence[bytes] = (), promoted: Sequence[bytes] = ()) -> None:
        self.sequence += 1
        change = Change(self.sequence, False, stored, evicted, demoted, promoted)
        for watcher in self._watchers:
            watcher.put(change)

    def watch(self) -> Watcher:
        watcher = Watcher(self._snapshot, self._max_pending_keys)
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def _snapshot(self) -> Change:
        return Change(self.sequence, True, self._content(), [], self._demoted())


class Watcher:
    """One watcher's queue. Its next() alternates with put() in one event loop."""

    def __init__(self, snapshot: Callable[[], Change], max_pending_keys: int) -> None:
        self._snapshot = snapshot
        self._max_pending_keys = max_pending_keys
        self._pending: deque[Change] = deque()
        self._needs_snapshot = True
        self._filled = asyncio.Event()
        self._filled.set()
        self.num_pending_keys = 0

    def put(self, change: Change) -> None:
        if self._needs_snapshot:
            return  # the snapshot, taken when it is sent, will contain the change
        self._pending.append(change)
        self.num_pending_keys += change.num_keys
        if self.num_pending_keys > self._max_pending_keys:
            self._pending.clear()
            self.num_pending_keys = 0
            self._needs_snapshot = True
        self._filled.set()

    async def next(self) -> Change:
        await self._filled.wait()
        if self._needs_snapshot:
            self._needs_snapshot = False
            change = self._snapshot()
        else:
            change = self._pending.popleft()
            self.num_pending_keys -= change.num_keys
        if not self._pending:
            self._filled.clear()
        return change
