"""Data connections: who may open one, what breaks, and who may touch a slot meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
import threading
from pathlib import Path

import numpy as np
import pytest

from halfmoon.deploy.certificates import init, rotate
from halfmoon.kvstore import data_server
from halfmoon.kvstore.data_lanes import DataLanes, read_reply
from halfmoon.kvstore.data_wire import PIECE_BYTES, Op, Request, receive_into, send_views
from halfmoon.kvstore.receive_buffers import ReceiveBuffers
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.credentials import Credentials, SocketTls
from halfmoon.protocol.errors import HandoffAborted, InvalidRequest, LeaseExpired, StoreUnavailable, WorkerLost
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.tls import MEMBER_NAME, Tls
from halfmoon.tests.waiting import until

WIDE = KVSchema(model_fingerprint="w" * 16, dtype="float32", num_layers=2, num_kv_heads=8, head_dim=128, block_size=512)  # 4 MiB a layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    init(folder, [], 1)
    return folder


@pytest.fixture
def certificates(folder: Path) -> Tls:
    return Tls.of_members(folder)


@pytest.fixture(params=["in the clear", "TLS"])
def credentials(request: pytest.FixtureRequest, certificates: Tls) -> Credentials | None:
    return Credentials.make() if request.param == "in the clear" else Credentials(Credentials.make().token, certificates)


def lanes_of(client) -> DataLanes:
    return client._transport._lanes


def knock(store: StoreServer, tls: Tls | None, token: bytes = b"x" * 32) -> None:
    of_client = None if tls is None else SocketTls.of_client(Credentials("x" * 32, tls))
    with DataLanes("store", "127.0.0.1", store._running().data.port, token, of_client).take():
        raise AssertionError("it was let in")


async def test_a_stranger_is_turned_away(store, credentials) -> None:
    with pytest.raises(OSError, match="of no session"):
        await asyncio.to_thread(knock, store, credentials.tls)


@pytest.mark.parametrize("credentials", ["TLS"], indirect=True)
async def test_with_tls_nobody_talks_in_the_clear_or_under_another_authority(kv, store, attach_to, credentials, tmp_path) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    assert isinstance(next(iter(lanes_of(client)._open)), ssl.SSLSocket)
    token = client._connection.welcome.data.token
    init(tmp_path / "others", [], 1)
    others = Tls.of_members(tmp_path / "others")
    stolen = dataclasses.replace(others, authority=credentials.tls.authority)  # it trusts ours, and shows its own
    for tls in (None, others, stolen):
        with pytest.raises(OSError):
            await asyncio.to_thread(knock, store, tls, token)
    sent = await kv.hand_off(client, "r1", 3)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), sent)


@pytest.mark.parametrize("credentials", ["TLS"], indirect=True)
async def test_after_a_change_lanes_stay_and_new_ones_have_the_new_certificates(kv, store, attach_to, credentials, folder) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    before, lane = credentials.tls, next(iter(lanes_of(client)._open))
    rotate(folder, [], 1)
    credentials.renew(Tls.of_members(folder))
    sent = await kv.hand_off(client, "r1", 3)
    assert lane in lanes_of(client)._open and shown(lane) == before.certificate
    for connection in list(store._running().data._connections):
        connection.shut_down()
    await until(lambda: not store._running().data._connections)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), sent)
    assert {shown(lane) for lane in lanes_of(client)._open} == {credentials.tls.certificate} != {before.certificate}
    expired = expired_certificates(folder)
    with pytest.raises(OSError):
        await asyncio.to_thread(knock, store, expired, client._connection.welcome.data.token)


def shown(lane: ssl.SSLSocket) -> bytes:
    """By the store."""
    return ssl.DER_cert_to_PEM_cert(lane.getpeercert(binary_form=True) or b"").encode()


def expired_certificates(folder: Path) -> Tls:
    """Of the same authority; the folder has good ones again afterwards."""
    rotate(folder, [], 0)
    expired = Tls.of_members(folder)
    rotate(folder, [], 1)
    return expired


async def test_a_session_s_end_closes_its_connections_and_its_token(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    token, data = client._connection.welcome.data.token, store._running().data
    assert len(data._connections) == 1
    await client.close()
    await until(lambda: not data._connections and token not in data._sessions)


@pytest.mark.parametrize(("op", "layer", "blocks"), [(Op.WRITE, 1, 2), (Op.WRITE, 0, 9), (Op.READ, 0, 2)])
async def test_a_wrong_request_is_refused_and_the_connection_goes_on(kv, store, attach_to, op, layer, blocks) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 10)

    def ask() -> None:
        with lanes_of(client).take() as lane:
            lane.sendall(Request(op, writer._lease_id, layer, 1, 0, blocks).pack())
            if op is Op.WRITE:
                lane.sendall(bytes(blocks * kv.schema.layer_bytes))
            read_reply(lane)

    with pytest.raises(InvalidRequest):
        await asyncio.to_thread(ask)
    await kv.push(writer, kv.blocks("r1", 2))
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), kv.blocks("r1", 2))
    assert len(store._running().data._connections) <= 2


async def test_another_session_s_lease_is_not_there(kv, store, attach_to) -> None:
    client, other = [await attach_to(store.address, name, transport="tcp") for name in ("prefill-0", "prefill-1")]
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 10)
    with pytest.raises(LeaseExpired):
        await asyncio.to_thread(lambda: list(other._transport.push(writer._lease_id, [0, 1], 0, 0, kv.blocks("x", 2)[:, 0])))


@pytest.mark.parametrize("direction", ["push", "fetch"])
async def test_a_connection_that_breaks_is_opened_again(kv, store, attach_to, direction) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")

    async def break_them() -> None:
        for connection in list(store._running().data._connections):
            connection.shut_down()
        await until(lambda: not store._running().data._connections)

    if direction == "push":
        await break_them()
    sent = await kv.hand_off(client, "r1", 3)
    if direction == "fetch":
        await break_them()
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), sent)


async def test_a_push_that_begins_anew_waits_for_the_end_of_the_one_that_broke(kv, store, attach_to, monkeypatch) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 10)
    gate, entered = threading.Event(), []

    def slow_once(connection: socket.socket, views: list[memoryview]) -> None:
        entered.append(connection)
        if len(entered) == 1:
            client._transport._lanes._open.copy().pop().shutdown(socket.SHUT_RDWR)
            gate.wait()
            raise ConnectionError("broken")
        receive_into(connection, views)

    monkeypatch.setattr(data_server, "receive_into", slow_once)
    access = store._running()._access
    pushing = asyncio.create_task(kv.push(writer, kv.blocks("r1", 2)))
    await until(lambda: len(store._running().data._connections) == 2)  # the second try has come
    assert len(entered) == 1 and len(access._leases[writer._lease_id].copying) == 1
    gate.set()
    await pushing
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), kv.blocks("r1", 2))


async def test_a_push_whose_answer_was_lost_is_written_once(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 10)
    blocks = kv.blocks("r1", 2)
    again = np.zeros_like(blocks[:, 0])
    await asyncio.to_thread(writer.push, 0, 0, blocks[:, 0])
    await asyncio.to_thread(lambda: list(client._transport.push(writer._lease_id, [0, 1], 0, 0, again)))
    for layer in (1, 2):
        await asyncio.to_thread(writer.push, layer, 0, blocks[:, layer])
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), blocks)


async def test_a_port_that_nobody_answers_at_leaves_grpc(kv, store, attach_to, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    monkeypatch.setattr(store._running().data, "port", free)
    client = await attach_to(store.address, "prefill-0", node_id="node-b")
    assert client.transport == "grpc"
    sent = await kv.hand_off(client, "r1")
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), sent)


async def test_an_aborted_push_is_broken_off_and_its_slots_wait_for_the_last_byte(kv, start_store, attach_to, monkeypatch) -> None:
    store = await start_store(num_slots=200_000)
    client = await attach_to(store.address, "prefill-0", transport="tcp", schema=WIDE)
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    gate, reached = threading.Event(), threading.Event()

    def stuck(connection: socket.socket, views: list[memoryview]) -> None:
        reached.set()
        gate.wait()
        receive_into(connection, views)

    monkeypatch.setattr(data_server, "receive_into", stuck)
    pushing = asyncio.create_task(asyncio.to_thread(writer.push, 0, 0, kv.blocks("r1", 2, WIDE)[:, 0].copy()))
    await asyncio.to_thread(reached.wait)
    await client.abort("r1", 1, WorkerLost("the request was cancelled"))
    await until(lambda: writer.failed is not None)
    num_slots = store.accounting().num_slots
    assert store.accounting() == (num_slots, 2, 0, num_slots - 2)  # a thread is still about to write
    gate.set()
    with pytest.raises(HandoffAborted, match="the request was cancelled"):
        await pushing
    await until(lambda: store.accounting() == (num_slots, 0, 0, num_slots))


async def test_a_reader_that_takes_nothing_loses_its_connection_with_its_lease(kv, start_store, attach_to) -> None:
    store = await start_store(num_slots=400_000)
    client = await attach_to(store.address, "prefill-0", transport="tcp", schema=WIDE)
    blocks = kv.blocks("p", 12, WIDE)
    writer = await client.cache(kv.keys("p", 12), 0)
    await kv.push(writer, blocks)
    await writer.seal(kv.state)
    reader = await client.fetch_prefix(kv.keys("p", 12))
    taken = lanes_of(client).take()
    lane = await asyncio.to_thread(taken.__enter__)
    lane.sendall(Request(Op.READ, reader._lease_id, 0, 2, 0, 12).pack())  # 96 MiB, more than sockets hold
    access = store._running()._access
    await until(lambda: bool(access._leases[reader._lease_id].copying))
    await reader.release()
    await until(lambda: store.accounting().num_leased == 0)
    with pytest.raises(OSError):
        read_reply(lane)
        await asyncio.to_thread(receive_into, lane, [memoryview(bytearray(12 * WIDE.block_bytes))])
    lane.close()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_a_bug_in_reading_is_raised_to_who_reads_and_does_not_leave_him_waiting(kv, store, attach_to, monkeypatch, transport) -> None:
    client = await attach_to(store.address, "prefill-0", transport=transport)
    writer = await client.reserve("r1", 1, kv.keys("r1", 3), 3, 10)
    await kv.push(writer, kv.blocks("r1", 3))
    await writer.seal(kv.state)
    reader = await client.fetch("r1", 1, 5)
    monkeypatch.setattr(reader._progress, "record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(60):
            await kv.read(reader)
    await reader.release()


async def test_a_lost_store_ends_pushes_and_fetches(kv, start_store, attach_to) -> None:
    store = await start_store()
    client = await attach_to(store.address, "prefill-0", transport="tcp")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    await store.stop(0)
    await client.lost.wait()
    with pytest.raises(StoreUnavailable):
        await kv.push(writer, kv.blocks("r1", 2))


@pytest.mark.parametrize("in_tls", [False, True])
def test_views_of_every_size_arrive_whole(in_tls: bool, certificates: Tls) -> None:
    generator = np.random.default_rng(0)
    sizes = [1, 3, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7, *generator.integers(1, 2000, 3000).tolist()]
    sent = [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    found = [np.zeros(size, np.uint8) for size in reversed(sizes)]
    left, right = socket.socketpair()
    if in_tls:
        name = {"server_hostname": MEMBER_NAME}
        left, right = [
            certificates.context(server_side=server).wrap_socket(
                one, server_side=server, do_handshake_on_connect=False, **({} if server else name)
            )
            for one, server in ((left, False), (right, True))
        ]
        shaking = threading.Thread(target=left.do_handshake)
        shaking.start()
        right.do_handshake()
        shaking.join()
    with left, right:
        sending = threading.Thread(target=send_views, args=(left, [array.data for array in sent]), daemon=True)
        sending.start()
        receive_into(right, [array.data for array in found])
        sending.join()
    assert np.array_equal(np.concatenate(sent), np.concatenate(found))


def test_a_buffer_is_used_again_when_its_last_view_is_gone_and_no_sooner() -> None:
    buffers = ReceiveBuffers()
    first = buffers.take(100_000)
    address, view = first.ctypes.data, first.reshape(10, -1)[3:]
    del first
    second = buffers.take(100_000)
    assert second.ctypes.data != address
    del view
    assert buffers.take(90_000).ctypes.data == address


def test_more_than_the_limit_of_idle_buffers_is_given_back_to_the_system() -> None:
    buffers = ReceiveBuffers(max_idle_bytes=2 * 2**17)
    taken = [buffers.take(2**17) for _ in range(5)]
    taken.clear()
    assert buffers._num_idle_bytes == 2 * 2**17
