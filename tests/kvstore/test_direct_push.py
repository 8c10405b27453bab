"""A push in two steps: the caller writes into the store's memory itself."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from halfmoon.kvstore import checksums
from halfmoon.protocol.errors import HalfmoonError, HandoffIncomplete, InvalidRequest, WorkerLost
from halfmoon.protocol.v1 import common_pb2
from halfmoon.tests.waiting import until


@pytest.fixture
async def client(store, attach_to):
    found = await attach_to(store.address, "prefill-0")
    assert found.transport == "shm" and found.arena is not None
    return found


def write(rows, blocks: np.ndarray) -> None:
    for row, block in zip(rows, blocks, strict=True):
        row[:] = block


async def test_layers_opened_together_and_closed_in_order_are_the_hand_off(kv, client) -> None:
    blocks = kv.blocks("r1", 4)
    writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)
    assert writer.memory is client.arena.memory

    def push() -> None:
        opened = [writer.rows(layer, 0, 4) for layer in range(3)]
        for layer, rows in enumerate(opened):
            write(rows, blocks[:, layer])
            writer.pushed(layer, 0, 4)

    await asyncio.to_thread(push)
    await writer.seal(kv.state)
    assert writer.num_bytes == blocks.nbytes
    reader = await client.fetch("r1", 1, 5)
    assert np.array_equal(await kv.read(reader), blocks)
    await reader.release()


async def test_layers_may_be_written_and_closed_together(kv, client) -> None:
    blocks = kv.blocks("r1", 4)
    writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)

    def push() -> None:
        for layer, num_layers in ((0, 2), (2, 1)):
            write(writer.rows(layer, 0, 4, num_layers), blocks[:, layer : layer + num_layers].reshape(4, -1))
            writer.pushed(layer, 0, 4, num_layers)

    await asyncio.to_thread(push)
    await writer.seal(kv.state)
    assert writer.num_bytes == blocks.nbytes
    reader = await client.fetch("r1", 1, 5)
    assert np.array_equal(await kv.read(reader), blocks)
    await reader.release()


async def test_a_seal_waits_for_the_threads_that_still_hash(kv, client, monkeypatch) -> None:
    gate, lanes = threading.Event(), tuple(ThreadPoolExecutor(1) for _ in range(2))
    monkeypatch.setattr(checksums, "lanes", lambda: lanes)  # there are none on a machine of few cores
    monkeypatch.setattr(checksums, "MIN_PARALLEL_BYTES", 0)
    try:
        for lane in lanes:
            lane.submit(gate.wait)
        blocks = kv.blocks("r1", 4)
        writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)
        write(writer.rows(0, 0, 4, 3), blocks.reshape(4, -1))
        writer.pushed(0, 0, 4, 3)
        sealing = asyncio.create_task(writer.seal(kv.state))
        await asyncio.wait({writer._stream})  # the store knows of every layer
        await client.stats()  # and would have the seal by now
        assert not sealing.done()
        gate.set()
        await sealing
        reader = await client.fetch("r1", 1, 5)
        assert np.array_equal(await kv.read(reader), blocks)
        await reader.release()
    finally:
        gate.set()
        for lane in lanes:
            await asyncio.to_thread(lane.shutdown)


async def test_layers_beyond_the_last_or_out_of_order_are_refused_and_their_rows_closed(kv, client) -> None:
    writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)
    with pytest.raises(IndexError, match="3 layers"):
        writer.rows(2, 0, 4, 2)
    for layer, num_layers in ((1, 2), (0, 4)):
        writer.rows(0, 0, 4)
        with pytest.raises(InvalidRequest, match="layer"):
            writer.pushed(layer, 0, 4, num_layers)
    await writer.abort(WorkerLost("no more of it"))


async def test_neighbouring_slots_are_one_run_also_after_others_were_freed(kv, store, client) -> None:
    for name in ("a", "b", "c"):
        writer = await client.reserve(name, 1, kv.keys(name, 4), 4, 30)
        rows = writer.rows(1, 0, 4)
        assert [run.shape for run in rows.runs] == [(4, kv.schema.layer_bytes)] and rows.runs[0].strides[0] == kv.schema.block_bytes
        assert [row.ctypes.data for row in rows] == [client.arena.row(slot, 1).ctypes.data for slot in writer._slots]
        writer.dropped()
        await writer.abort(WorkerLost("no more of it"))
        await until(lambda: store.accounting().num_free == 8)


async def test_a_lease_lost_between_rows_and_pushed_keeps_its_slots_until_the_copy_is_over(kv, store, client) -> None:
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    first, second = await asyncio.to_thread(lambda: (writer.rows(0, 0, 2), writer.rows(1, 0, 2)))
    await client.abort("r1", 1, WorkerLost("decode-0 died"))
    await until(lambda: writer.failed is not None)
    await client.stats()  # a Release sent before would have arrived
    assert store.accounting().num_leased == 2
    with pytest.raises(HalfmoonError):
        writer.rows(2, 0, 2)
    write(first, kv.blocks("r1", 2)[:, 0])
    with pytest.raises(HalfmoonError):
        await asyncio.to_thread(writer.pushed, 0, 0, 2)
    await client.stats()
    assert store.accounting().num_leased == 2  # the other copy is still under way
    write(second, kv.blocks("r1", 2)[:, 1])
    await asyncio.to_thread(writer.dropped)
    await until(lambda: store.accounting().num_free == 8)


async def test_dropped_rows_do_not_count_as_pushed(kv, client) -> None:
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    write(writer.rows(0, 0, 2), kv.blocks("r1", 2)[:, 0])
    writer.dropped()
    assert writer.num_bytes == 0
    with pytest.raises(HandoffIncomplete, match="block 0 from layer 0"):
        await writer.seal(kv.state)


async def test_rows_of_present_blocks_and_of_none_are_refused(kv, client) -> None:
    await kv.cache(client, "p", 2)
    writer = await client.reserve("r1", 1, kv.keys("p", 2), 3, 30)
    assert writer.present == [True, True, False]
    for first, last in ((0, 3), (1, 2), (2, 4), (2, 2), (-1, 1)):
        with pytest.raises(InvalidRequest, match="are not all to be written by this lease"):
            writer.rows(0, first, last)
    with pytest.raises(IndexError):
        writer.rows(3, 2, 3)
    await writer.abort(WorkerLost("enough"))


async def test_layers_closed_out_of_order_are_refused_and_closed(kv, store, client) -> None:
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    writer.rows(1, 0, 2)
    with pytest.raises(InvalidRequest, match="layer 1 for block 0, which has 0 of 3 layers"):
        writer.pushed(1, 0, 2)
    await writer.abort(WorkerLost("enough"))
    await until(lambda: store.accounting().num_free == 8)  # nothing counts as being copied any more


async def test_a_writer_over_grpc_has_no_memory_to_write_into(kv, store, attach_to) -> None:
    client = await attach_to(store.address, "prefill-0", transport="grpc")
    writer = await client.cache(kv.keys("p", 2), 0)
    assert writer.memory is None
    with pytest.raises(RuntimeError, match="push them"):
        writer.rows(0, 0, 2)
    await kv.push(writer, kv.blocks("p", 2))
    await writer.seal(common_pb2.HandoffState())
