"""One store copies blocks out of another: both real, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.connection import Connection
from halfmoon.kvstore.reader import BlockReader, BlockSlice
from halfmoon.kvstore.replication import Reply, _runs
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import DeadlineExceeded, HandoffCorrupt, InternalError, InvalidRequest, SchemaMismatch, StoreUnavailable
from halfmoon.protocol.v1 import kvstore_pb2, kvstore_pb2_grpc
from halfmoon.tests.waiting import until

SOURCE = """
import asyncio, hashlib
import numpy as np
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.schema import KVSchema
from halfmoon.kvstore import store
from halfmoon.protocol.v1 import common_pb2

store.READ_BYTES = 1  # a slice is one layer of one block, and a copy many slices

async def main():
    schema = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
    server = StoreServer(StoreConfig(arena_bytes=8 * schema.block_bytes, lease_ttl_s=1.0), node_id="source")
    address = await server.start("127.0.0.1")
    client = await StoreClient.attach(address, client_id="c", node_id="source", schema=schema)
    keys = [hashlib.blake2b(f"p/{index}".encode(), digest_size=16).digest() for index in range(8)]
    writer = await client.cache(keys, 0)
    for layer in range(3):
        await asyncio.to_thread(writer.push, layer, 0, np.full((8, schema.layer_bytes), layer, np.uint8))
    await writer.seal(common_pb2.HandoffState())
    await client.close()
    print(address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def source_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A store of its own process that holds the 8 blocks of "p", and its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(SOURCE), stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def at_rest(store: StoreServer, num_cached: int) -> bool:
    slots = store.accounting()
    return slots == (slots.num_slots, 0, num_cached, slots.num_slots - num_cached) and store.load().num_leases == 0


class Gate:
    """Holds every replica back after its first slice, until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()
        slices = BlockReader.slices

        async def gated(reader: BlockReader) -> AsyncIterator[Any]:
            async for piece in slices(reader):
                yield piece
                self.reader = reader
                self.reached.set()
                await self.opened.wait()

        monkeypatch.setattr(BlockReader, "slices", gated)


@pytest.fixture
async def pair(kv, start_store, attach_to) -> Any:
    """(source, its client, target, its client)."""
    source, target = await start_store(), await start_store(schema=kv.schema)
    return source, await attach_to(source.address, "source client"), target, await attach_to(target.address, "target client")


async def test_what_is_missing_is_copied_announced_and_cached(kv, pair) -> None:
    source, there, target, here = pair
    sent = await kv.cache(there, "p", 5)
    await kv.cache(here, "p", 2)
    watch = here.watch()
    await anext(watch)
    reply = await here.replicate(kv.keys("p", 5), source.address, 10)
    assert (reply.num_blocks, reply.num_bytes, reply.num_held, reply.stop) == (3, 3 * kv.schema.block_bytes, 5, Reply.STOP_COMPLETE)
    assert reply.seconds > 0
    assert list((await anext(watch)).stored) == kv.keys("p", 5)[2:]
    assert at_rest(target, 5)
    reader = await here.fetch_prefix(kv.keys("p", 5))
    assert np.array_equal(await kv.read(reader), sent)
    await reader.release()
    await until(lambda: at_rest(source, 5) and source.load().num_sessions == 1)
    assert source.stats().num_expired_leases == 0


async def test_a_copy_says_how_far_it_is_while_it_runs(kv, pair, monkeypatch) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 5)
    monkeypatch.setattr("halfmoon.kvstore.store.READ_BYTES", kv.schema.layer_bytes)  # of one message
    gate, told = Gate(monkeypatch), list[Any]()
    heard = asyncio.Event()
    copying = asyncio.create_task(
        here.replicate(kv.keys("p", 5), source.address, 60, on_progress=lambda reply: (told.append(reply), heard.set()))
    )
    await heard.wait()
    assert not copying.done() and told[0].stop == Reply.STOP_UNSPECIFIED and told[0].num_held == 0
    assert 0 < told[0].num_bytes < told[0].num_bytes_wanted == 5 * kv.schema.block_bytes
    gate.opened.set()
    reply = await copying
    told.append(reply)
    assert [one.num_bytes for one in told] == sorted(one.num_bytes for one in told)
    assert (reply.num_bytes, reply.num_held, reply.stop) == (reply.num_bytes_wanted, 5, Reply.STOP_COMPLETE)
    assert at_rest(target, 5)


async def test_what_the_source_does_not_hold_ends_the_run(kv, pair) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 3)
    reply = await here.replicate(kv.keys("p", 6), source.address, 10)
    assert (reply.num_blocks, reply.num_held, reply.stop) == (3, 3, Reply.STOP_SOURCE)
    again = await here.replicate(kv.keys("p", 3), source.address, 10)
    assert (again.num_blocks, again.num_held, again.stop) == (0, 3, Reply.STOP_COMPLETE)
    nothing = await here.replicate(kv.keys("q", 6), source.address, 10)
    assert (nothing.num_blocks, nothing.num_held, nothing.stop) == (0, 0, Reply.STOP_SOURCE)
    assert at_rest(target, 3)


async def test_a_block_held_behind_a_missing_one_is_not_fetched_again(kv, pair) -> None:
    source, there, _target, here = pair
    sent = await kv.cache(there, "p", 4)
    writer = await here.cache([kv.keys("p", 4)[2]], 0)
    await kv.push(writer, sent[2:3])
    await writer.seal(kv.state)
    reply = await here.replicate(kv.keys("p", 4), source.address, 10)
    assert (reply.num_blocks, reply.num_held) == (3, 4)
    reader = await here.fetch_prefix(kv.keys("p", 4))
    assert np.array_equal(await kv.read(reader), sent)


async def test_cached_blocks_make_room_and_leased_ones_do_not(kv, pair) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 8)
    await kv.cache(here, "p", 1)
    await kv.cache(here, "old", 3)
    await here.reserve("r1", 1, [], 1, 30)
    open_writer = await here.reserve("r2", 1, kv.keys("r2", 2), 2, 30)
    reply = await here.replicate(kv.keys("p", 8), source.address, 10)
    assert (reply.num_blocks, reply.num_held, reply.stop) == (4, 5, Reply.STOP_NO_ROOM)
    assert target.accounting() == (8, 3, 5, 0)
    assert await here.lookup(kv.keys("old", 3)) == 0 and await here.lookup(kv.keys("p", 8)) == 5
    await kv.push(open_writer, kv.blocks("r2", 2))
    await open_writer.seal(kv.state)


async def test_without_any_room_nothing_is_copied_and_the_source_is_not_asked(kv, pair) -> None:
    _source, _there, _target, here = pair
    await here.reserve("r1", 1, [], 1, 30)
    await here.reserve("r2", 1, kv.keys("r2", 7), 7, 30)
    reply = await here.replicate(kv.keys("p", 2), "127.0.0.1:1", 10)
    assert (reply.num_blocks, reply.num_held, reply.stop) == (0, 0, Reply.STOP_NO_ROOM)


async def test_another_schema_is_refused_and_nothing_kept(kv, pair, start_store, attach_to) -> None:
    _, _, target, here = pair
    other = dataclasses.replace(kv.schema, model_fingerprint="e" * 16)
    stranger = await start_store(schema=other)
    with pytest.raises(SchemaMismatch, match="model_fingerprint"):
        await here.replicate(kv.keys("p", 2), stranger.address, 10)
    assert at_rest(target, 0)


async def test_a_source_that_is_not_there_is_named(kv, pair) -> None:
    _, _, target, here = pair
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await here.replicate(kv.keys("p", 2), "127.0.0.1:1", 10)
    with pytest.raises(InvalidRequest, match="source_address"):
        await here.replicate(kv.keys("p", 2), "", 10)
    assert at_rest(target, 0)


async def test_a_member_cannot_have_a_store_connect_outside_the_cluster(kv) -> None:
    """It copies from stores that the proxy has named, and connects nowhere else."""
    credentials, connected = Credentials.make(), list[str]()

    def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(str(writer.get_extra_info("peername")))
        writer.close()

    outside = await asyncio.start_server(listens, "127.0.0.1", 0)
    host, port = outside.sockets[0].getsockname()
    server = StoreServer(StoreConfig(arena_bytes=8 * kv.schema.block_bytes), node_id="n", schema=kv.schema, credentials=credentials)
    request = kvstore_pb2.ReplicateRequest(block_keys=kv.keys("p", 1), source_address=f"{host}:{port}", deadline_s=60)
    try:
        async with open_channel(await server.start("127.0.0.1"), credentials) as channel:
            for named in ([], ["127.0.0.1:1"]):
                server.know_stores(named)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await kvstore_pb2_grpc.KVStoreStub(channel).Replicate(request).read()
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED and not connected
            server.know_stores([f"{host}:{port}"])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await kvstore_pb2_grpc.KVStoreStub(channel).Replicate(request).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and connected, "one that is named is asked"
    finally:
        await server.stop(0)
        outside.close()
        await outside.wait_closed()


async def test_a_store_without_a_schema_yet_has_nothing_to_copy_into(kv, start_store) -> None:
    fresh = await start_store()
    async with open_channel(fresh.address) as channel:
        request = kvstore_pb2.ReplicateRequest(block_keys=kv.keys("p", 1), source_address="127.0.0.1:1", deadline_s=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kvstore_pb2_grpc.KVStoreStub(channel).Replicate(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "attach first" in str(caught.value.details())


async def test_a_connection_that_breaks_inside_grpc_is_a_store_that_is_gone() -> None:
    connection = Connection("127.0.0.1:1", "c")
    nothing = grpc.aio.Metadata()
    broken = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core")
    assert isinstance(connection.error(broken), StoreUnavailable)
    unknown = grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, nothing, nothing, details="no such method")
    assert isinstance(connection.error(unknown), InternalError)
    await connection.close()


async def test_altered_bytes_are_found_dropped_at_the_source_and_not_kept(kv, pair) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 3)
    source._running()._layout().row(1, 2)[7] ^= 1
    with pytest.raises(HandoffCorrupt, match="block 1 "):
        await here.replicate(kv.keys("p", 3), source.address, 10)
    assert at_rest(target, 0)
    assert await here.lookup(kv.keys("p", 3)) == 0 and await there.lookup(kv.keys("p", 3)) == 1
    reply = await here.replicate(kv.keys("p", 3), source.address, 10)
    assert (reply.num_blocks, reply.stop) == (1, Reply.STOP_SOURCE)


async def test_many_asked_at_once_do_the_work_once(kv, pair) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 6)
    asked = [here.replicate(kv.keys("p", num_blocks), source.address, 10) for num_blocks in (6, 6, 4, 2, 6)]
    replies = await asyncio.gather(*asked)
    assert sum(reply.num_blocks for reply in replies) == 6
    assert [reply.num_held for reply in replies] == [6, 6, 4, 2, 6]
    assert source.stats().num_bytes_fetched == 6 * kv.schema.block_bytes
    assert at_rest(target, 6)


async def test_who_waited_for_a_cancelled_copy_makes_it_himself(kv, pair, monkeypatch) -> None:
    source, there, target, here = pair
    sent = await kv.cache(there, "p", 4)
    gate = Gate(monkeypatch)
    first = asyncio.ensure_future(here.replicate(kv.keys("p", 4), source.address, 60))
    await gate.reached.wait()
    assert target.accounting().num_leased == 4
    second = asyncio.ensure_future(here.replicate(kv.keys("p", 4), source.address, 60))
    gate.reached.clear()
    first.cancel()
    await gate.reached.wait()  # the second one is at its first slice now
    gate.opened.set()
    assert (await second).num_blocks == 4
    monkeypatch.undo()
    assert np.array_equal(await kv.read(await here.fetch_prefix(kv.keys("p", 4))), sent)


async def test_a_cancelled_copy_frees_everything_on_both_sides(kv, pair, monkeypatch) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 4)
    gate = Gate(monkeypatch)
    asked = asyncio.ensure_future(here.replicate(kv.keys("p", 4), source.address, 60))
    await gate.reached.wait()
    asked.cancel()
    await until(lambda: at_rest(target, 0) and at_rest(source, 4))
    await until(lambda: source.load().num_sessions == 1)


async def test_a_copy_that_takes_too_long_ends_and_frees_everything(kv, pair, monkeypatch) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 4)
    Gate(monkeypatch)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await here.replicate(kv.keys("p", 4), source.address, 0.2)
    await until(lambda: at_rest(target, 0) and at_rest(source, 4))


async def test_a_store_that_stops_ends_its_copies_and_the_source_hears_of_it(kv, pair, monkeypatch) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 4)
    gate = Gate(monkeypatch)
    asked = asyncio.ensure_future(here.replicate(kv.keys("p", 4), source.address, 60))
    await gate.reached.wait()
    stopping = asyncio.ensure_future(target.stop(20))
    with pytest.raises(StoreUnavailable, match=r"is stopping|stopped"):
        await asked
    await stopping
    await until(lambda: at_rest(source, 4) and source.load().num_sessions == 1)


async def test_a_source_killed_in_the_middle_of_a_copy_is_an_error_and_nothing_is_kept(kv, pair, monkeypatch) -> None:
    _, _, target, here = pair
    gate = Gate(monkeypatch)
    async with source_process() as (process, address):
        asked = asyncio.ensure_future(here.replicate(kv.keys("p", 8), address, 60))
        await gate.reached.wait()
        assert target.accounting() == (8, 8, 0, 0)
        process.send_signal(signal.SIGKILL)
        await gate.reader._connection.lost.wait()
        gate.opened.set()
        with pytest.raises(StoreUnavailable, match=address):
            await asked
        assert at_rest(target, 0) and await here.lookup(kv.keys("p", 8)) == 0
        with pytest.raises(StoreUnavailable, match=address):
            await here.replicate(kv.keys("p", 8), address, 10)


async def test_others_are_served_while_a_copy_runs(kv, pair, monkeypatch) -> None:
    source, there, _target, here = pair
    await kv.cache(there, "p", 4)
    gate = Gate(monkeypatch)
    asked = asyncio.ensure_future(here.replicate(kv.keys("p", 4), source.address, 60))
    await gate.reached.wait()
    await kv.hand_off(here, "r1", 2)
    reader = await here.fetch("r1", 1, 10)
    monkeypatch.undo()
    assert np.array_equal(await kv.read(reader), kv.blocks("r1", 2))
    await reader.release()
    gate.opened.set()
    assert (await asked).num_blocks == 4


async def test_metrics_count_blocks_bytes_seconds_and_outcomes(kv, pair) -> None:
    source, there, target, here = pair
    await kv.cache(there, "p", 3)
    await here.replicate(kv.keys("p", 3), source.address, 10)
    with pytest.raises(StoreUnavailable):
        await here.replicate(kv.keys("q", 2), "127.0.0.1:1", 10)
    registry = target._running().metrics.registry
    assert registry.get_sample_value("halfmoon_store_replicated_blocks_total") == 3
    assert registry.get_sample_value("halfmoon_store_replicated_bytes_total") == 3 * kv.schema.block_bytes
    for outcome in ("complete", "store_unavailable"):
        assert registry.get_sample_value("halfmoon_store_replication_seconds_count", {"outcome": outcome}) == 1


def shared(held: dict[str, int], chain: str, num_blocks: int) -> int:
    return min(held.get(chain, 0), num_blocks)


@given(
    there=st.fixed_dictionaries({"a": st.integers(0, 5), "b": st.integers(0, 3)}),
    here=st.fixed_dictionaries({"a": st.integers(0, 3), "old": st.integers(0, 3)}),
    num_leased=st.integers(0, 5),
    asked=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 7)), min_size=1, max_size=5),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_stands_where_copies_are_leading_runs_of_the_right_bytes(kv, there, here, num_leased, asked) -> None:
    async def scenario() -> None:
        stores = [StoreServer(StoreConfig(arena_bytes=8 * kv.schema.block_bytes), node_id=kv.node) for _ in range(2)]
        clients = [
            await StoreClient.attach(await store.start("127.0.0.1"), client_id="c", node_id=kv.node, schema=kv.schema) for store in stores
        ]
        for client, content in zip(clients, (there, here), strict=True):
            for chain, num_blocks in content.items():
                if num_blocks:
                    await kv.cache(client, chain, num_blocks)
        if num_leased:
            await clients[1].reserve("r1", 1, kv.keys("r1", num_leased), num_leased, 30)
        before = {"a": await clients[1].lookup(kv.keys("a", 8))}
        replies = await asyncio.gather(
            *(clients[1].replicate(kv.keys(chain, num_blocks), stores[0].address, 20) for chain, num_blocks in asked)
        )
        slots = stores[1].accounting()
        assert slots.num_leased == num_leased and sum(slots[1:]) == 8
        fits = num_leased + here["old"] + sum(max(here.get(chain, 0), there[chain]) for chain in "ab") <= 8  # with nothing evicted
        copied = sum(reply.num_bytes for reply in replies)
        assert copied == stores[0].stats().num_bytes_fetched or (not fits and copied < stores[0].stats().num_bytes_fetched)
        for (chain, num_blocks), reply in zip(asked, replies, strict=True):
            most = max(shared(there, chain, num_blocks), shared(before, chain, num_blocks))
            assert reply.num_held <= most and (not fits or reply.num_held == most)
            assert (reply.stop == Reply.STOP_COMPLETE) == (reply.num_held == num_blocks)
        for chain in "ab":
            reader = await clients[1].fetch_prefix(kv.keys(chain, 8))
            found = await kv.read(reader)
            assert np.array_equal(found, kv.blocks(chain, 8)[: len(found)])
        for client in clients:
            await client.close()
        for store in stores:
            await store.stop(0)

    asyncio.run(scenario())


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0, 1, 5, 6], [None, 4, None, 5], [None] * 4, [3, 4, None, None]])
def test_runs_are_neighbours_at_the_target(places) -> None:
    piece = BlockSlice(0, 0, [np.full(1, block, np.uint8) for block in range(4)])
    found = {first + index: int(block[0]) for first, blocks in _runs(piece, places) for index, block in enumerate(blocks)}
    assert found == {place: block for block, place in enumerate(places) if place is not None}
