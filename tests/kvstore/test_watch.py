from __future__ import annotations

import asyncio

from halfmoon.kvstore.watch import WatchFeed


class Held:
    """What the keys are, and a feed over them."""

    def __init__(self, max_pending_keys: int) -> None:
        self.keys: list[bytes] = []
        self.feed = WatchFeed(lambda: list(self.keys), max_pending_keys)

    def store(self, key: bytes) -> None:
        self.keys.append(key)
        self.feed.publish([key], [])

    def evict(self, key: bytes) -> None:
        self.keys.remove(key)
        self.feed.publish([], [key])


async def test_a_slow_watcher_is_bounded_and_gets_a_new_snapshot() -> None:
    held = Held(max_pending_keys=10)
    watcher = held.feed.watch()
    assert (await watcher.next()).snapshot
    most = 0
    for index in range(1000):
        held.store(b"%d" % index)
        most = max(most, watcher.num_pending_keys, len(watcher._pending))
    assert most <= 10
    change = await watcher.next()
    assert change.snapshot and change.stored == held.keys and change.sequence == 1000
    held.evict(b"7")
    change = await watcher.next()
    assert (change.snapshot, change.evicted, change.sequence) == (False, [b"7"], 1001)


async def test_replaying_the_feed_gives_the_content_whatever_the_pace() -> None:
    held = Held(max_pending_keys=3)
    watcher = held.feed.watch()
    seen: set[bytes] = set()
    last = None
    for index in range(60):
        held.store(b"%d" % index)
        if index % 3 == 2:
            held.evict(b"%d" % (index - 1))
        while index % 7 == 0 and last != held.feed.sequence:
            change = await watcher.next()
            seen = set(change.stored) if change.snapshot else seen - set(change.evicted) | set(change.stored)
            assert change.snapshot or last is None or change.sequence == last + 1
            last = change.sequence
            assert last != held.feed.sequence or seen == set(held.keys)


async def test_a_watcher_waits_for_the_next_change_and_can_leave() -> None:
    held = Held(max_pending_keys=3)
    watcher = held.feed.watch()
    await watcher.next()
    waiting = asyncio.ensure_future(watcher.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    held.store(b"a")
    assert (await waiting).stored == [b"a"]
    held.feed.leave(watcher)
    assert held.feed.num_watchers == 0
