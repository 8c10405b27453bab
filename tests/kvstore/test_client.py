"""The store's semantics as a worker meets them: a real server on loopback, over every transport."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import weakref

import numpy as np
import pytest

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.handoff import HandoffId
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.errors import (
    DeadlineExceeded,
    HandoffAborted,
    HandoffIncomplete,
    InvalidRequest,
    PromptTooLong,
    SchemaMismatch,
    StaleEpoch,
    StoreFull,
    StoreUnavailable,
    WorkerLost,
)
from halfmoon.protocol.schema import KVSchema
from halfmoon.tests.waiting import until


def num_fetching(store: StoreServer, handoff_id: str) -> int:
    """Fetches that have reached the store and wait there."""
    return store._running()._waiters.num_waiting(handoff_id)


def num_reserving(store: StoreServer) -> int:
    """Reserves that have reached the store and wait for room."""
    return len(store._running()._reserving)


async def test_a_hand_off_arrives_byte_for_byte_with_its_state(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    sent = await kv.hand_off(prefill, "r1", 3)
    reader = await decode.fetch("r1", 1, 5)
    found = await kv.read(reader)
    assert np.array_equal(found, sent)
    assert reader.state == kv.state and reader.num_blocks == 3 and reader.block_keys == kv.keys("r1", 2)
    assert reader.num_bytes == sent.nbytes
    await reader.release()
    assert store.accounting()[1:] == (0, 2, 6)  # the full blocks stay cached, the partial one is free


async def test_slices_arrive_while_later_layers_are_still_being_pushed(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    blocks = kv.blocks("r1", 2)
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    reader = await decode.fetch("r1", 1, 5)
    slices = reader.slices()
    for layer in range(3):
        await asyncio.to_thread(writer.push, layer, 0, blocks[:, layer])
        part = await anext(slices)
        assert (part.layer, part.first_block) == (layer, 0)
        assert np.array_equal(np.stack(part.blocks), blocks[:, layer])
        assert reader.state is None
    await writer.seal(kv.state)
    with pytest.raises(StopAsyncIteration):
        await anext(slices)
    assert reader.state == kv.state


async def test_a_fetch_may_come_before_its_reserve(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    fetching = asyncio.ensure_future(decode.fetch("r1", 1, 60))
    await until(lambda: num_fetching(store, "r1") == 1)
    assert not fetching.done()
    sent = await kv.hand_off(prefill, "r1")
    assert np.array_equal(await kv.read(await fetching), sent)


async def test_a_fetch_that_nobody_reserves_ends_at_its_deadline(attach) -> None:
    decode = await attach("decode-0")
    with pytest.raises(DeadlineExceeded, match="hand-off r1 epoch 1 was not reserved"):
        await decode.fetch("r1", 1, 0.05)


async def test_a_fetch_that_is_not_sealed_ends_at_its_deadline_and_tells_the_writer(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    reader = await decode.fetch("r1", 1, 0.1)
    with pytest.raises(DeadlineExceeded, match="0 of 2 blocks are written"):
        await kv.read(reader)
    await reader.release()
    await until(lambda: isinstance(writer.failed, HandoffAborted | StaleEpoch))
    await until(lambda: store.accounting().num_free == 8)


async def test_cached_blocks_are_shared_and_not_pushed_again(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    first = await kv.cache(prefill, "p", 2)
    blocks = np.concatenate([first, kv.blocks("rest", 2)])
    keys = [*kv.keys("p", 2), *kv.keys("rest", 1)]
    writer = await prefill.reserve("r1", 1, keys, 4, 5)
    assert writer.present == [True, True, False, False]
    assert store.accounting().num_leased == 4
    await kv.push(writer, blocks)
    await writer.seal(kv.state)
    assert writer.num_bytes == blocks[2:].nbytes
    assert np.array_equal(await kv.read(await decode.fetch("r1", 1, 5)), blocks)


async def test_fetch_prefix_gives_the_longest_leading_run_and_pins_it(kv, store, attach) -> None:
    client = await attach("prefill-0")
    kept = await kv.cache(client, "p", 3)
    reader = await client.fetch_prefix([*kv.keys("p", 3)[:2], *kv.keys("other", 2)])
    assert reader.num_blocks == 2 and reader.block_keys == kv.keys("p", 2)
    assert store.accounting()[1:] == (2, 1, 5)
    assert np.array_equal(await kv.read(reader), kept[:2]) and reader.state is None
    await reader.release()
    assert store.accounting()[1:] == (0, 3, 5)


async def test_a_prefix_that_is_not_held_has_no_blocks(kv, attach) -> None:
    client = await attach("prefill-0")
    reader = await client.fetch_prefix(kv.keys("p", 3))
    assert reader.num_blocks == 0
    assert [part async for part in reader.slices()] == []
    await reader.release()
    stats = await client.stats()
    assert (stats.num_query_blocks, stats.num_hit_blocks) == (3, 0)


async def test_lookup_counts_leading_keys(kv, attach) -> None:
    client = await attach("prefill-0")
    await kv.cache(client, "p", 3)
    assert await client.lookup(kv.keys("p", 5)) == 3
    assert await client.lookup(kv.keys("p", 3)[1:]) == 2
    assert await client.lookup(kv.keys("q", 3)) == 0


async def test_the_first_of_two_equal_blocks_wins_and_the_duplicate_is_freed_on_release(kv, store, attach) -> None:
    prefill, other, decode = await attach("prefill-0"), await attach("prefill-1"), await attach("decode-0")
    keys, blocks = kv.keys("same", 2), kv.blocks("same", 2)
    writers = [await prefill.reserve("r1", 1, keys, 2, 5), await other.reserve("r2", 1, keys, 2, 5)]
    for writer in writers:
        await kv.push(writer, blocks)
        await writer.seal(kv.state)
    assert store.accounting()[1:] == (4, 0, 4)
    for name in ("r1", "r2"):
        reader = await decode.fetch(name, 1, 5)
        assert np.array_equal(await kv.read(reader), blocks)
        await reader.release()
    assert store.accounting()[1:] == (0, 2, 6)


async def test_an_incomplete_seal_names_what_is_missing_and_may_be_completed(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    blocks = kv.blocks("r1", 3)
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 3), 3, 5)
    await asyncio.to_thread(writer.push, 0, 0, blocks[:, 0])
    await asyncio.to_thread(writer.push, 1, 0, blocks[:2, 1])
    await asyncio.to_thread(writer.push, 2, 0, blocks[:1, 2])
    with pytest.raises(HandoffIncomplete, match=r"block 1 from layer 2, block 2 from layer 1") as caught:
        await writer.seal(kv.state)
    assert caught.value.fields["num_missing_blocks"] == 2
    await asyncio.to_thread(writer.push, 1, 2, blocks[2:, 1])
    await asyncio.to_thread(writer.push, 2, 1, blocks[1:, 2])
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await decode.fetch("r1", 1, 5)), blocks)


async def test_abort_by_the_writer_wakes_the_fetcher_with_the_reason(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    reader = await decode.fetch("r1", 1, 60)
    reading = asyncio.ensure_future(kv.read(reader))
    await writer.abort(WorkerLost("the engine caught fire", worker="prefill-0"))
    with pytest.raises(HandoffAborted, match="the engine caught fire") as caught:
        await reading
    assert caught.value.fields["reason"] == "worker_lost"
    await reader.release()
    await until(lambda: store.accounting().num_free == 8)


async def test_abort_by_a_third_client_stops_writer_and_fetcher(kv, store, attach) -> None:
    prefill, decode, proxy = await attach("prefill-0"), await attach("decode-0"), await attach("proxy")
    blocks = kv.blocks("r1", 2)
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    await asyncio.to_thread(writer.push, 0, 0, blocks[:, 0])
    reader = await decode.fetch("r1", 1, 60)
    assert await proxy.abort("r1", 1, WorkerLost("the client went away"))
    with pytest.raises(HandoffAborted, match="the client went away"):
        await kv.read(reader)
    await reader.release()
    await until(lambda: writer.failed is not None)
    with pytest.raises(HandoffAborted, match="the client went away"):
        await asyncio.to_thread(writer.push, 1, 0, blocks[:, 1])
    with pytest.raises(HandoffAborted, match="the client went away"):
        await writer.seal(kv.state)
    await until(lambda: store.accounting().num_free == 8 and store.load().num_leases == 0)
    assert not await proxy.abort("r1", 1, WorkerLost("again"))


async def test_abort_wakes_a_fetch_that_waits_for_its_reserve(store, attach) -> None:
    decode = await attach("decode-0")
    fetching = asyncio.ensure_future(decode.fetch("r1", 2, 60))
    await until(lambda: num_fetching(store, "r1") == 1)
    assert await decode.abort("r1", 2, WorkerLost("prefill-0 died in its queue"))
    with pytest.raises(HandoffAborted, match="prefill-0 died in its queue"):
        await fetching


async def test_after_an_abort_its_epochs_are_stale_and_the_next_one_works(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    await decode.abort("r1", 2, WorkerLost("gone"))
    for epoch in (1, 2):
        with pytest.raises(StaleEpoch, match="gone"):
            await prefill.reserve("r1", epoch, [], 1, 5)
        with pytest.raises(StaleEpoch, match="gone"):
            await decode.fetch("r1", epoch, 5)
    sent = await kv.hand_off(prefill, "r1", epoch=3)
    assert np.array_equal(await kv.read(await decode.fetch("r1", 3, 5)), sent)


async def test_a_later_epoch_takes_the_place_of_an_earlier_one(kv, store, attach) -> None:
    prefill = await attach("prefill-0")
    old = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    new = await prefill.reserve("r1", 2, kv.keys("r1", 2), 2, 5)
    await until(lambda: isinstance(old.failed, HandoffAborted | StaleEpoch))
    assert new.failed is None
    with pytest.raises(StaleEpoch):
        await prefill.reserve("r1", 1, [], 1, 5)
    with pytest.raises(InvalidRequest, match="reserved already"):
        await prefill.reserve("r1", 2, [], 1, 5)
    await until(lambda: store.accounting().num_leased == 2)


async def test_a_released_hand_off_can_not_be_fetched_again(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    await kv.hand_off(prefill, "r1")
    reader = await decode.fetch("r1", 1, 5)
    with pytest.raises(InvalidRequest, match="being fetched already"):
        await decode.fetch("r1", 1, 5)
    await kv.read(reader)
    await reader.release()
    await reader.release()
    with pytest.raises(StaleEpoch, match="fetched and released"):
        await decode.fetch("r1", 1, 5)


async def test_a_sealed_hand_off_that_nobody_fetches_ends_at_its_deadline(kv, store, attach_to) -> None:
    prefill = await attach_to(store.address, "prefill-0")
    await kv.hand_off(prefill, "r1", 3, deadline_s=3)  # enough for a slow machine to seal it
    assert store.accounting().num_leased == 3
    await until(lambda: store.accounting().num_leased == 0)
    assert store.accounting().num_cached == 2 and store.stats().num_expired_leases == 1
    with pytest.raises(StaleEpoch, match="nobody fetched it before its deadline"):
        await prefill.fetch("r1", 1, 5)


async def test_a_hand_off_that_is_being_read_outlives_its_deadline(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    sent = await kv.hand_off(prefill, "r1", deadline_s=60)
    reader = await decode.fetch("r1", 1, 60)
    store._running()._handoff_due(HandoffId("r1", 1))  # what its timer calls
    assert np.array_equal(await kv.read(reader), sent)


async def test_a_sealed_hand_off_outlives_its_writer(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    sent = await kv.hand_off(prefill, "r1")
    await prefill.close()
    assert np.array_equal(await kv.read(await decode.fetch("r1", 1, 5)), sent)


async def test_a_writer_that_detaches_aborts_its_unsealed_hand_offs_with_a_reason(kv, store, attach) -> None:
    prefill, decode = await attach("prefill worker prefill-7"), await attach("decode-0")
    await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    reader = await decode.fetch("r1", 1, 60)
    await prefill.close()
    with pytest.raises(HandoffAborted, match="prefill worker prefill-7 went away before the seal"):
        await kv.read(reader)
    await reader.release()
    await until(lambda: store.accounting().num_free == 8)


async def test_a_fetcher_that_detaches_stops_the_writer(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 2), 2, 5)
    await decode.fetch("r1", 1, 60)
    await decode.close()
    await until(lambda: writer.failed is not None)
    assert "decode-0" in str(writer.failed)
    await until(lambda: store.accounting().num_free == 8)


async def test_a_full_store_makes_reserve_wait_and_a_release_wakes_it(kv, store, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    await kv.hand_off(prefill, "r1", 6)
    waiting = asyncio.ensure_future(prefill.reserve("r2", 1, kv.keys("r2", 4), 4, 600))  # no deadline ends its wait within the test
    await until(lambda: num_reserving(store) == 1)
    assert not waiting.done()
    reader = await decode.fetch("r1", 1, 5)
    await kv.read(reader)
    await reader.release()
    assert (await waiting).num_blocks == 4


async def test_reserve_says_store_full_at_its_deadline_with_the_numbers(kv, attach) -> None:
    prefill = await attach("prefill-0")
    await kv.hand_off(prefill, "r1", 6)
    with pytest.raises(StoreFull, match=r"no room for 4 blocks of hand-off r2 epoch 1.*of 8 slots 6 are leased, 0 cached, 2 free"):
        await prefill.reserve("r2", 1, kv.keys("r2", 4), 4, 0.05)
    with pytest.raises(StoreFull, match="4 blocks of a cache entry"):
        await prefill.cache(kv.keys("k", 4), 0)
    with pytest.raises(PromptTooLong, match="can never fit"):
        await prefill.reserve("r4", 1, kv.keys("r4", 9), 9, 60)
    with pytest.raises(StoreFull, match="can never fit"):
        await prefill.cache(kv.keys("k", 9), 60)


async def test_reserves_are_served_first_come_first_served(kv, store, attach) -> None:
    prefill = await attach("prefill-0")
    first = await prefill.reserve("r1", 1, kv.keys("r1", 6), 6, 30)
    large = asyncio.ensure_future(prefill.reserve("r2", 1, kv.keys("r2", 7), 7, 600))
    await until(lambda: num_reserving(store) == 1)
    small = asyncio.ensure_future(prefill.reserve("r3", 1, kv.keys("r3", 1), 1, 600))
    await until(lambda: num_reserving(store) == 2)
    assert not small.done() and not large.done()  # the small one would fit, and would starve the large one
    await first.abort(WorkerLost("done"))
    await asyncio.gather(large, small)


async def test_abort_ends_a_reserve_that_waits_for_room(kv, store, attach) -> None:
    prefill = await attach("prefill-0")
    await prefill.reserve("r1", 1, kv.keys("r1", 8), 8, 30)
    waiting = asyncio.ensure_future(prefill.reserve("r2", 1, kv.keys("r2", 2), 2, 600))
    await until(lambda: num_reserving(store) == 1)
    await prefill.abort("r2", 1, WorkerLost("the client went away"))
    with pytest.raises(HandoffAborted, match="the client went away"):
        await waiting


async def test_a_cancelled_reserve_leaves_nothing_behind(kv, store, attach) -> None:
    prefill = await attach("prefill-0")
    holder = await prefill.reserve("r1", 1, kv.keys("r1", 8), 8, 30)
    waiting = asyncio.ensure_future(prefill.reserve("r2", 1, kv.keys("r2", 2), 2, 30))
    keeping = asyncio.ensure_future(prefill.cache(kv.keys("k", 2), 30))
    await until(lambda: num_reserving(store) == 2)
    waiting.cancel()
    keeping.cancel()
    await asyncio.gather(waiting, keeping, return_exceptions=True)
    await holder.abort(WorkerLost("done"))
    await until(lambda: store.accounting().num_free == 8 and store.load().num_leases == 0)


async def test_a_store_that_ends_under_a_cancelled_reserve_is_no_news(kv, store, attach, monkeypatch) -> None:
    """Nobody takes what the Reserve ends with, and asyncio must not complain of it."""
    prefill, complaints, asked = await attach("prefill-0"), [], []
    await prefill.reserve("r1", 1, kv.keys("r1", 8), 8, 30)
    start = prefill._connection.start
    monkeypatch.setattr(prefill._connection, "start", lambda work: asked.append(weakref.ref(task := start(work))) or task)
    waiting = asyncio.ensure_future(prefill.reserve("r2", 1, kv.keys("r2", 2), 2, 30))
    await until(lambda: num_reserving(store) == 1)

    async def store_is_gone(*_) -> None:
        raise StoreUnavailable("the store is gone")

    monkeypatch.setattr(prefill, "abort", store_is_gone)
    waiting.cancel()
    await asyncio.wait({waiting})
    del waiting  # its traceback holds the Reserve's task
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
    try:
        await store.stop(0)
        await until(lambda: (task := asked[0]()) is None or task.done())
        await asyncio.sleep(0)
        gc.collect()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert complaints == []


async def test_a_cancelled_fetch_leaves_nothing_behind(kv, store, attach) -> None:
    client = await attach("prefill-0")
    await kv.cache(client, "p", 4)
    for turns in range(6):
        fetching = asyncio.ensure_future(client.fetch_prefix(kv.keys("p", 4)))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        fetching.cancel()
        result = (await asyncio.gather(fetching, return_exceptions=True))[0]
        if not isinstance(result, BaseException):
            await result.release()
    await until(lambda: store.accounting()[1:] == (0, 4, 4) and store.load().num_leases == 0)


async def test_eviction_takes_the_oldest_cached_blocks_and_never_leased_ones(kv, store, attach) -> None:
    prefill = await attach("prefill-0")
    await kv.cache(prefill, "old", 2)
    await kv.cache(prefill, "pinned", 2)
    await kv.cache(prefill, "new", 2)
    pinned = await prefill.fetch_prefix(kv.keys("pinned", 2))
    unsealed = await prefill.reserve("r1", 1, kv.keys("r1", 3), 3, 5)  # 2 free, 1 evicted
    assert await prefill.lookup(kv.keys("old", 2)) == 1  # the end of the oldest chain goes first
    assert await prefill.lookup(kv.keys("new", 2)) == 2
    with pytest.raises(StoreFull):
        await prefill.cache(kv.keys("k", 4), 0)
    assert await prefill.lookup(kv.keys("old", 2)) == 1  # nothing was evicted in vain
    await prefill.cache(kv.keys("k", 3), 0)
    assert await prefill.lookup(kv.keys("pinned", 2)) == 2 and unsealed.failed is None
    assert np.array_equal(await kv.read(pinned), kv.blocks("pinned", 2))
    assert store.stats().num_evicted_blocks == 4


async def test_watch_gives_a_snapshot_and_then_every_change_without_gaps(kv, attach) -> None:
    client = await attach("prefill-0")
    await kv.cache(client, "a", 2)
    watch = client.watch()
    snapshot = await anext(watch)
    assert snapshot.snapshot and set(snapshot.stored) == set(kv.keys("a", 2))
    await kv.cache(client, "b", 6)
    await client.cache(kv.keys("c", 1), 0)
    stored, evicted = await anext(watch), await anext(watch)
    assert list(stored.stored) == kv.keys("b", 6) and not stored.snapshot
    assert list(evicted.evicted) == kv.keys("a", 2)[1:]
    assert [stored.sequence, evicted.sequence] == [snapshot.sequence + 1, snapshot.sequence + 2]


async def test_stats_add_up(kv, attach) -> None:
    prefill, decode = await attach("prefill-0"), await attach("decode-0")
    sent = await kv.hand_off(prefill, "r1", 3)
    await kv.read(await decode.fetch("r1", 1, 5))
    stats = await decode.stats()
    assert stats.num_bytes_arena == 8 * kv.schema.block_bytes
    assert stats.num_bytes_leased + stats.num_bytes_cached + stats.num_bytes_free == stats.num_bytes_arena
    assert stats.num_bytes_pushed == stats.num_bytes_fetched == sent.nbytes
    assert (stats.num_sessions, stats.num_handoffs, stats.num_leases) == (2, 1, 1)
    assert KVSchema.from_proto(stats.schema) == kv.schema


async def test_another_schema_is_refused_with_both_sides_printed(kv, store, attach_to) -> None:
    await attach_to(store.address, "prefill-0")
    other = dataclasses.replace(kv.schema, num_kv_heads=4, dtype="bfloat16")
    with pytest.raises(SchemaMismatch, match=r"differ in dtype, num_kv_heads.*num_kv_heads=2.*num_kv_heads=4") as caught:
        await attach_to(store.address, "decode-0", schema=other)
    assert set(caught.value.fields["differing"]) == {"dtype", "num_kv_heads"}


async def test_attach_fails_at_once_where_nothing_listens(kv) -> None:
    with pytest.raises(StoreUnavailable, match="died or stopped"):  # not "did not answer within"
        await StoreClient.attach("127.0.0.1:1", client_id="c", node_id="n", schema=kv.schema, timeout_s=30)


async def test_clients_of_other_nodes_use_data_connections(kv, store, attach_to) -> None:
    remote = await attach_to(store.address, "decode-9", node_id="node-b")
    local = await attach_to(store.address, "prefill-0")
    assert (remote.transport, local.transport) == ("tcp", "shm")
    sent = await kv.hand_off(local, "r1")
    assert np.array_equal(await kv.read(await remote.fetch("r1", 1, 5)), sent)
    sent = await kv.hand_off(remote, "r2")
    assert np.array_equal(await kv.read(await local.fetch("r2", 1, 5)), sent)


async def test_a_client_that_can_not_map_the_arena_falls_back_to_data_connections(kv, store, attach_to, monkeypatch) -> None:
    # as in a container that has the same node name and a /dev/shm of its own
    def no_such_file(*args: object) -> None:
        raise FileNotFoundError("no arena here")

    monkeypatch.setattr("halfmoon.kvstore.client.open_arena", no_such_file)
    client = await attach_to(store.address, "prefill-0")
    assert client.transport == "tcp"
    kept = await kv.cache(client, "p", 2)
    assert np.array_equal(await kv.read(await client.fetch_prefix(kv.keys("p", 2))), kept)


async def test_calls_on_a_closed_client_say_so(kv, store, attach) -> None:
    client = await attach("prefill-0")
    waiting = asyncio.ensure_future(client.fetch("r1", 1, 60))
    await until(lambda: num_fetching(store, "r1") == 1)
    await client.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        await waiting
    with pytest.raises(StoreUnavailable, match="is closed"):
        await client.lookup([])
    assert not client.lost.is_set()
