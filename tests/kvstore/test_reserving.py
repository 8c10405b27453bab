"""Reserve under many waiters, in a store without a network: who gets the room, and how many are woken for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from halfmoon.kvstore.arena import Arena
from halfmoon.kvstore.handoff import HandoffId, Lease
from halfmoon.kvstore.sessions import Session
from halfmoon.kvstore.store import Store
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import HandoffAborted, LeaseExpired, StoreFull, StoreUnavailable, WorkerLost
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2

NUM_SLOTS = 8


class Site:
    """A store of NUM_SLOTS slots, sessions of it, and how often a Reserve that waits has been woken."""

    def __init__(self, store: Store, kv: Any) -> None:
        self.store, self.kv, self.num_wakeups = store, kv, 0
        wait = store._waiters.wait

        async def counted(key: Any, deadline: float) -> bool:
            woken = await wait(key, deadline)
            self.num_wakeups += 1
            return woken

        store._waiters.wait = counted
        self.session_id = self.attach("prefill-0").session_id

    def attach(self, client_id: str) -> Session:
        hello = kvstore_pb2.AttachRequest.Hello(client_id=client_id, schema=self.kv.schema.to_proto())
        return self.store.attach(hello)[0]

    async def reserve(self, name: str, num_blocks: int, *, deadline_s: float = 60.0, session_id: str = "") -> Lease:
        request = kvstore_pb2.ReserveRequest(
            session_id=session_id or self.session_id,
            purpose=kvstore_pb2.ReserveRequest.PURPOSE_HANDOFF,
            handoff=common_pb2.HandoffId(id=name, epoch=1),
            block_keys=self.kv.keys(name, num_blocks),
            num_blocks=num_blocks,
            deadline_s=deadline_s,
        )
        return await self.store.reserve(request)

    async def start_reserve(self, name: str, num_blocks: int, **options: Any) -> asyncio.Task[Lease]:
        """Returns once it waits."""
        task = asyncio.create_task(self.reserve(name, num_blocks, **options))
        await asyncio.sleep(0)
        assert not task.done()
        return task

    async def cache(self, name: str, num_blocks: int, deadline_s: float = 0.0) -> Lease:
        request = kvstore_pb2.ReserveRequest(
            session_id=self.session_id,
            purpose=kvstore_pb2.ReserveRequest.PURPOSE_CACHE,
            block_keys=self.kv.keys(name, num_blocks),
            num_blocks=num_blocks,
            deadline_s=deadline_s,
        )
        return await self.store.reserve(request)


@pytest.fixture
async def site(kv: Any, tmp_path: Path) -> AsyncIterator[Site]:
    arena = Arena(NUM_SLOTS * kv.schema.block_bytes, tmp_path)
    store = Store(StoreConfig(lease_ttl_s=600), arena, store_id="store-0", node_id="node-a")
    yield Site(store, kv)
    await store.drain(0)
    arena.close()


@pytest.mark.parametrize("num_waiters", [50, 5_000])
async def test_a_release_wakes_the_first_and_the_next_however_many_wait(site: Site, num_waiters: int) -> None:
    holder = await site.reserve("holder", NUM_SLOTS)
    waiting = [await site.start_reserve(f"r{number}", NUM_SLOTS) for number in range(num_waiters)]
    site.num_wakeups = 0
    site.store.release(holder.lease_id)
    await waiting[0]
    await asyncio.sleep(0)
    assert site.num_wakeups == 2  # the second is the first by now, looks, and finds no room
    assert [task.done() for task in waiting[:3]] == [True, False, False]


async def test_room_for_several_goes_to_them_in_order_of_arrival(site: Site) -> None:
    holder = await site.reserve("holder", NUM_SLOTS)
    order: list[str] = []
    for name in ("r1", "r2", "r3"):
        (await site.start_reserve(name, 4)).add_done_callback(lambda _, name=name: order.append(name))
    site.store.release(holder.lease_id)
    while len(order) < 2:
        await asyncio.sleep(0)
    assert order == ["r1", "r2"] and site.store.accounting().num_free == 0


async def test_blocks_to_cache_find_the_free_slots_that_the_first_in_line_cannot_use_yet(site: Site) -> None:
    await site.reserve("holder", 5)
    large = await site.start_reserve("large", 6)
    assert (await site.cache("p", 3)).slots
    assert not large.done()


async def test_those_who_pass_do_not_starve_a_large_reserve(site: Site) -> None:
    holder = await site.reserve("holder", 5)
    large = await site.start_reserve("large", 4)
    passed = []
    with pytest.raises(StoreFull, match="1 other requests wait"):
        while True:  # each leaves before the next comes: without an end to it, they would hold the room between them for ever
            for lease in passed:
                site.store.release(lease.lease_id)
            passed = [await site.cache(f"p{len(passed)}", 3)]
    assert len(passed) == 1
    site.store.release(passed[0].lease_id)
    site.store.release(holder.lease_id)
    assert len((await large).slots) == 4


async def test_a_reserve_whose_deadline_comes_takes_room_that_the_first_cannot_use(site: Site) -> None:
    await site.reserve("holder", 5)
    large = await site.start_reserve("large", 6)
    assert len((await site.reserve("small", 2, deadline_s=0.01)).slots) == 2
    with pytest.raises(StoreFull):
        await site.reserve("too large", 5, deadline_s=0.01)
    assert not large.done()


async def test_an_abort_wakes_the_reserve_of_its_hand_off_and_a_sessions_end_those_of_the_session(site: Site) -> None:
    await site.reserve("holder", NUM_SLOTS)
    other = site.attach("prefill-1")
    first = await site.start_reserve("first", 1)
    aborted = await site.start_reserve("aborted", 1)
    theirs = [await site.start_reserve(f"theirs{number}", 1, session_id=other.session_id) for number in range(2)]
    last = await site.start_reserve("last", 1)
    site.num_wakeups = 0
    site.store.abort(HandoffId("aborted", 1), WorkerLost("the client went away"))
    with pytest.raises(HandoffAborted, match="the client went away"):
        await aborted
    site.store.sessions.end(other, "went away")
    for outcome in await asyncio.gather(*theirs, return_exceptions=True):
        assert isinstance(outcome, LeaseExpired)
    assert site.num_wakeups == 3 and not first.done() and not last.done()


async def test_a_store_that_stops_tells_everyone_who_waits(site: Site) -> None:
    await site.reserve("holder", NUM_SLOTS)
    waiting = [await site.start_reserve(f"r{number}", 1) for number in range(3)]
    await site.store.drain(0)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable)
