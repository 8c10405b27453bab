"""Processes that die or fall silent, and bytes that change: what the others are told, and that nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from halfmoon.kvstore import checksums
from halfmoon.kvstore.arena import FOLDER, PREFIX, remove_abandoned
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.sessions import Sessions
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import HandoffAborted, HandoffCorrupt, HandoffIncomplete, LeaseExpired, StaleEpoch, StoreUnavailable
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2
from halfmoon.tests.waiting import until

WRITER = """
import asyncio, sys
import numpy as np
from halfmoon.kvstore.client import StoreClient
from halfmoon.protocol.schema import KVSchema

async def main():
    schema = KVSchema(model_fingerprint="f" * 16, dtype="float32", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
    client = await StoreClient.attach(sys.argv[1], client_id="prefill worker p0", node_id="node-a", schema=schema, transport=sys.argv[2])
    writer = await client.reserve("r1", 1, [], 1, 60)
    writer.push(0, 0, np.full((1, schema.layer_bytes), 7, np.uint8))
    print(client.transport, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

STORE = """
import asyncio
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.config import StoreConfig

async def main():
    server = StoreServer(StoreConfig(arena_bytes=8 * 768, lease_ttl_s=1.0), node_id="node-a")
    print(await server.start("127.0.0.1"), server._arena.path, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def start_process(script: str, *args: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script), *args, stdout=asyncio.subprocess.PIPE, env=environment
    )


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


@pytest.mark.parametrize("transport", ["auto", "tcp", "grpc"])
async def test_a_writer_killed_in_the_middle_of_its_push_wakes_the_fetcher_at_once(kv, store, attach_to, transport) -> None:
    decode = await attach_to(store.address, "decode-0", transport=transport)
    process = await start_process(WRITER, store.address, transport)
    try:
        assert await first_line(process) == ("shm" if transport == "auto" else transport)
        reader = await decode.fetch("r1", 1, 60)
        slices = reader.slices()
        assert (await anext(slices)).blocks[0][0] == 7
        process.send_signal(signal.SIGKILL)
        with pytest.raises(HandoffAborted, match="prefill worker p0 went away before the seal"):
            await anext(slices)  # not "was silent": nobody waited for its heartbeats
        await reader.release()
        with pytest.raises(StaleEpoch, match="prefill worker p0 went away before the seal"):
            await decode.fetch("r1", 1, 60)
        await until(lambda: store.accounting().num_free == 8 and store.load().num_sessions == 1)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_killed_store_fails_every_pending_call_and_its_arena_is_removed_by_the_next_store(kv, start_store, attach_to) -> None:
    process = await start_process(STORE)
    address, arena = (await first_line(process)).split()
    client = await attach_to(address, "decode-0")
    remote = await attach_to(address, "prefill-0", transport="grpc")
    assert (client.transport, remote.transport) == ("shm", "grpc")
    writer = await remote.reserve("r1", 1, kv.keys("r1", 2), 2, 60)
    reader = await client.fetch("r1", 1, 60)
    watch = client.watch()
    await anext(watch)
    pending = [
        asyncio.ensure_future(kv.read(reader)),
        asyncio.ensure_future(client.fetch("other", 1, 60)),
        asyncio.ensure_future(client.reserve("r2", 1, kv.keys("r2", 8), 8, 60)),
        asyncio.ensure_future(anext(watch)),
    ]
    process.kill()
    await process.wait()
    for outcome in await asyncio.gather(*pending, return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable), outcome
    await client.lost.wait()
    await until(lambda: isinstance(writer.failed, StoreUnavailable))
    with pytest.raises(StoreUnavailable):
        await client.lookup([])
    with pytest.raises(StoreUnavailable):
        await writer.seal(kv.state)
    await reader.release()  # nothing to release, and no reason to fail
    await start_store()
    assert not Path(arena).exists()


async def test_a_store_that_is_stopped_in_its_tracks_is_lost_after_the_ttl(attach_to) -> None:
    process = await start_process(STORE)
    try:
        client = await attach_to((await first_line(process)).split()[0], "decode-0")
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match=r"did not answer heartbeats for 1.0 s"):
            await client.fetch("r1", 1, 60)
        assert client.lost.is_set()
    finally:
        process.kill()
        await process.wait()
        remove_abandoned()


async def test_a_silent_client_loses_its_session_and_its_hand_offs(kv, start_store, attach_to) -> None:
    store: StoreServer = await start_store(lease_ttl_s=2.0)
    decode = await attach_to(store.address, "decode-0")
    silent = await attach_to(store.address, "prefill-0")
    writer = await silent.reserve("r1", 1, kv.keys("r1", 2), 2, 60)
    reader = await decode.fetch("r1", 1, 60)
    session = next(one for one in store._running().sessions._open.values() if one.client_id == "prefill-0")
    silent._connection.welcome.lease_ttl_s = 600  # it is not to be the one who notices
    beats = session.num_beats
    await until(lambda: session.num_beats > beats + 1)
    silent._connection.welcome.heartbeat_interval_s = 60  # too late for the beat under way, and none follows
    with pytest.raises(HandoffAborted, match=r"prefill-0 was silent for \d+\.\d s before the seal"):
        await kv.read(reader)
    await silent.lost.wait()
    with pytest.raises(StoreUnavailable, match="silent"):
        await silent.lookup([])
    await until(lambda: writer.failed is not None)
    await reader.release()
    await until(lambda: store.accounting().num_free == 8)
    assert store.stats().num_expired_leases == 1
    assert not decode.lost.is_set()


async def test_heartbeats_keep_an_idle_session_alive(kv, start_store, attach_to) -> None:
    store = await start_store(lease_ttl_s=1.0)
    client = await attach_to(store.address, "prefill-0")
    (session,) = store._running().sessions._open.values()
    await until(lambda: session.num_beats > 8)  # twice the TTL, by heartbeats alone
    await kv.cache(client, "p", 1)
    assert not client.lost.is_set()


async def test_a_loop_that_stood_still_for_longer_than_the_ttl_loses_no_session(kv, start_store, attach_to) -> None:
    store = await start_store(lease_ttl_s=0.4)
    client = await attach_to(store.address, "prefill-0")
    (session,) = store._running().sessions._open.values()
    time.sleep(1.0)  # both sides: nobody could send a heartbeat, or read one
    beats = session.num_beats
    await until(lambda: session.num_beats > beats + 2)
    await kv.cache(client, "p", 1)
    assert not client.lost.is_set()


async def test_a_stall_of_almost_the_ttl_right_behind_a_look_at_who_is_silent_loses_no_session() -> None:
    ended: list[str] = []
    sessions = Sessions(0.4, lambda _, what: ended.append(what))
    session = sessions.open("prefill-0")
    await asyncio.sleep(0.38)
    sessions.touch(session)
    await asyncio.sleep(0.04)
    time.sleep(0.39)
    for _ in range(3):  # turns of the loop
        await asyncio.sleep(0)
    assert ended == []
    await until(lambda: bool(ended))
    assert len(sessions) == 0 and session.ended.done()


async def test_slots_of_an_aborted_shm_lease_stay_leased_until_its_client_lets_go(kv, store, attach_to) -> None:
    prefill = await attach_to(store.address, "prefill-0")
    blocks = kv.blocks("r1", 8)
    writer = await prefill.reserve("r1", 1, kv.keys("r1", 8), 8, 60)
    writer._begin_copying()  # the engine's thread is inside a copy
    await prefill.abort("r1", 1, LeaseExpired("given up"))
    await until(lambda: writer.failed is not None)
    await asyncio.sleep(0.05)
    assert store.accounting().num_leased == 8
    waiting = asyncio.ensure_future(prefill.reserve("r1", 2, [], 1, 60))
    await asyncio.to_thread(writer._end_copying)
    await waiting
    assert store.accounting().num_leased == 1
    with pytest.raises((HandoffAborted, StaleEpoch), match="given up"):
        await asyncio.to_thread(writer.push, 0, 0, blocks[:, 0])


async def test_slots_of_an_aborted_shm_reader_stay_leased_until_release(kv, store, attach_to) -> None:
    prefill, decode = await attach_to(store.address, "prefill-0"), await attach_to(store.address, "decode-0")
    await kv.hand_off(prefill, "r1", 2)
    reader = await decode.fetch("r1", 1, 60)
    parts = [part async for part in reader.slices()]
    await prefill.abort("r1", 1, LeaseExpired("given up"))
    assert store.accounting().num_leased == 2
    assert np.array_equal(parts[0].blocks[0], kv.blocks("r1", 2)[0].reshape(-1)), "all layers in one slice"
    await reader.release()
    assert store.accounting()[1:] == (0, 1, 7)


def flip_byte(store: StoreServer, slot: int, layer: int) -> None:
    store._running()._layout().row(slot, layer)[5] ^= 1


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("transport", ["auto", "tcp", "grpc"])
async def test_a_byte_altered_in_the_arena_is_found_and_the_block_is_named(kv, store, attach_to, transport, layer) -> None:
    prefill = await attach_to(store.address, "prefill-0", transport=transport)
    decode = await attach_to(store.address, "decode-0", transport=transport)
    await kv.hand_off(prefill, "r1", 3)
    flip_byte(store, 1, layer)
    reader = await decode.fetch("r1", 1, 5)
    with pytest.raises(HandoffCorrupt, match="checksum of block 1 ") as caught:
        await kv.read(reader)
    assert caught.value.fields["blocks"] == [1] and reader.state is None
    await reader.release()


async def test_a_corrupt_cached_block_is_found_once_and_never_again(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "prefill-0")
    await kv.cache(client, "p", 3)
    watch = client.watch()
    await anext(watch)
    flip_byte(store, 1, 1)
    reader = await client.fetch_prefix(kv.keys("p", 3))
    with pytest.raises(HandoffCorrupt, match=r"cached prefix is corrupt.*block 1 "):
        await kv.read(reader)
    await reader.release()
    assert await client.lookup(kv.keys("p", 3)) == 1
    assert list((await anext(watch)).evicted) == kv.keys("p", 3)[1:2]
    assert store.accounting()[1:] == (0, 2, 6)
    await kv.cache(client, "p", 3)
    assert np.array_equal(await kv.read(await client.fetch_prefix(kv.keys("p", 3))), kv.blocks("p", 3))


async def test_a_byte_altered_on_the_wire_is_found(kv, store, attach_to, monkeypatch) -> None:
    prefill = await attach_to(store.address, "prefill-0", transport="grpc")
    decode = await attach_to(store.address, "decode-0", transport="grpc")
    await kv.hand_off(prefill, "r1", 3)
    reader = await decode.fetch("r1", 1, 5)
    fetch = decode._transport.fetch

    def altered(lease_id, slots, part):
        if part.layer == 1:
            data = bytearray(part.data)
            data[-1] ^= 0x80
            part.data = bytes(data)
        return fetch(lease_id, slots, part)

    monkeypatch.setattr(reader._transport, "fetch", altered)
    with pytest.raises(HandoffCorrupt, match="checksum of block 2 "):
        await kv.read(reader)


async def test_a_seal_without_a_checksum_for_each_block_is_incomplete(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "decode-0")
    await kv.hand_off(client, "r1", 3)
    reader = await client.fetch("r1", 1, 5)
    verify = reader._verify

    def verify_fewer(sealed: kvstore_pb2.FetchReply.Sealed) -> None:
        del sealed.checksums[-1]
        verify(sealed)

    reader._verify = verify_fewer
    with pytest.raises(HandoffIncomplete, match="3 blocks and 2 checksums"):
        await kv.read(reader)
    assert reader.state is None


async def test_a_reader_waits_for_the_threads_that_still_hash(kv, store, attach_to, monkeypatch) -> None:
    client = await attach_to(store.address, "decode-0")
    sent = await kv.hand_off(client, "r1", 3)
    gate, lanes = threading.Event(), tuple(ThreadPoolExecutor(1) for _ in range(2))
    monkeypatch.setattr(checksums, "lanes", lambda: lanes)  # there are none on a machine of few cores
    monkeypatch.setattr(checksums, "MIN_PARALLEL_BYTES", 0)
    try:
        for lane in lanes:
            lane.submit(gate.wait)
        reader = await client.fetch("r1", 1, 5)
        reading = asyncio.create_task(kv.read(reader))
        await until(lambda: reader._progress.is_complete)
        for _ in range(3):  # the seal is here, and would have been compared by now
            await client.stats()
        assert not reading.done()
        gate.set()
        assert np.array_equal(await reading, sent)
    finally:
        gate.set()
        for lane in lanes:
            await asyncio.to_thread(lane.shutdown)


async def test_a_slice_cut_short_on_the_wire_is_incomplete(kv, store, attach_to, monkeypatch) -> None:
    client = await attach_to(store.address, "decode-0", transport="grpc")
    await kv.hand_off(client, "r1", 3)
    reader = await client.fetch("r1", 1, 5)
    fetch = client._transport.fetch

    def cut(lease_id, slots, part):
        part.data = part.data[:-1]
        return fetch(lease_id, slots, part)

    monkeypatch.setattr(reader._transport, "fetch", cut)
    with pytest.raises(HandoffIncomplete, match="layer 0 of 3 blocks from block 0 came with 767 bytes of 768"):
        await kv.read(reader)


async def test_a_skipped_slice_is_incomplete_even_where_the_store_says_sealed(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "decode-0", transport="grpc")
    await kv.hand_off(client, "r1", 3)
    reader = await client.fetch("r1", 1, 5)
    read = reader._call.read

    class Lossy:
        num_read = 0

        async def read(self):
            self.num_read += 1
            return await read() if self.num_read != 3 else (await read(), await read())[1]  # the last layer is lost

        def cancel(self) -> None:
            reader_call.cancel()

    reader_call, reader._call = reader._call, Lossy()
    with pytest.raises(HandoffIncomplete, match="block 0 from layer 2, block 1 from layer 2, block 2 from layer 2"):
        await kv.read(reader)


async def test_the_store_itself_refuses_an_incomplete_seal_and_a_slice_of_a_wrong_size(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "prefill-0", transport="grpc")
    connection = client._connection
    request = kvstore_pb2.ReserveRequest(
        session_id=connection.session_id,
        purpose=kvstore_pb2.ReserveRequest.PURPOSE_HANDOFF,
        handoff=common_pb2.HandoffId(id="r1", epoch=1),
        num_blocks=1,
        deadline_s=5,
    )
    lease_id = (await connection.call(connection.stub.Reserve, request)).lease_id
    with pytest.raises(HandoffIncomplete, match="block 0 from layer 0"):
        await connection.call(connection.stub.Seal, kvstore_pb2.SealRequest(lease_id=lease_id, checksums=[0]))
    push = connection.stub.Push(iter([kvstore_pb2.PushRequest(lease_id=lease_id, num_blocks=1)]))
    with pytest.raises(Exception, match="0 bytes; it must have 256"):
        await push


async def test_a_process_that_was_stopped_past_its_ttl_does_not_trust_what_it_read(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "decode-0")
    await kv.cache(client, "p", 1)
    client._connection._alive_until = 0.0  # as after a stop: the heartbeats are overdue
    reader = await client.fetch_prefix(kv.keys("p", 1))
    assert np.array_equal(await kv.read(reader), kv.blocks("p", 1))  # a round trip showed that the session lives
    await reader.release()
    await until(lambda: store.load().num_leases == 0)
    reader = await client.fetch_prefix(kv.keys("p", 1))
    verify = reader._verify

    def verify_and_expire(sealed: kvstore_pb2.FetchReply.Sealed) -> None:
        verify(sealed)
        store._running()._manager().end_session(client._connection.session_id, "was silent")

    reader._verify = verify_and_expire
    with pytest.raises(LeaseExpired, match="attach again"):
        await kv.read(reader)
    assert reader.state is None


async def test_stop_lets_open_hand_offs_end_and_refuses_new_ones(kv, attach_to) -> None:
    server = StoreServer(StoreConfig(arena_bytes=8 * kv.schema.block_bytes), node_id=kv.node)
    await server.start("127.0.0.1")
    client = await attach_to(server.address, "c")
    sent = await kv.hand_off(client, "r1")
    stopping = asyncio.ensure_future(server.stop(600))
    await asyncio.sleep(0.02)
    with pytest.raises(StoreUnavailable, match="is stopping"):
        await client.reserve("r2", 1, [], 1, 5)
    reader = await client.fetch("r1", 1, 5)
    assert np.array_equal(await kv.read(reader), sent)
    await reader.release()
    await asyncio.wait_for(stopping, 60)
    await client.lost.wait()


async def test_stop_without_grace_ends_everything_and_removes_the_arena(kv, attach_to) -> None:
    server = StoreServer(StoreConfig(arena_bytes=8 * kv.schema.block_bytes), node_id=kv.node)
    await server.start("127.0.0.1")
    assert server._arena is not None
    path = server._arena.path
    client = await attach_to(server.address, "c")
    waiting = [asyncio.ensure_future(client.fetch("r1", 1, 60)), asyncio.ensure_future(client.reserve("r2", 1, [b"k" * 16] * 8, 8, 60))]
    await asyncio.sleep(0.02)
    await server.stop(0)
    for outcome in await asyncio.gather(waiting[0], return_exceptions=True):
        assert isinstance(outcome, StoreUnavailable)
    await client.lost.wait()
    assert not path.exists() and path.name.startswith(PREFIX) and path.parent == FOLDER
