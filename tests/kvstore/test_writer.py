"""BlockWriter: the engine's thread against the wire."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from halfmoon.kvstore.writer import BlockWriter, _runs
from halfmoon.protocol.errors import HandoffAborted, InvalidRequest, WorkerLost
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import kvstore_pb2

WIDE = KVSchema(model_fingerprint="w" * 16, dtype="float32", num_layers=2, num_kv_heads=8, head_dim=128, block_size=128)  # 1 MiB a layer


async def test_a_push_over_grpc_waits_for_room_in_its_queue(kv, start_store, attach_to, monkeypatch) -> None:
    store = await start_store(num_slots=30_000)
    client = await attach_to(store.address, "prefill-0", transport="grpc", schema=WIDE)
    blocks = kv.blocks("r1", 6, WIDE)
    queued: list[int] = []
    enqueue = BlockWriter._enqueue

    def measured(self: BlockWriter, message: kvstore_pb2.PushRequest) -> None:
        enqueue(self, message)
        queued.append(self._num_queued_bytes)

    monkeypatch.setattr(BlockWriter, "_enqueue", measured)
    writer = await client.reserve("r1", 1, kv.keys("r1", 6), 6, 30)
    writer._max_queued_bytes = 4 * 2**20
    await kv.push(writer, blocks)
    await writer.seal(kv.state)
    assert len(queued) == 6 and max(queued) <= 4 * 2**20  # 12 MiB in messages of 2 MiB
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5), WIDE), blocks)


async def test_a_push_that_waits_for_room_stops_when_the_lease_is_gone(kv, start_store, attach_to, monkeypatch) -> None:
    store = await start_store(num_slots=30_000)
    client = await attach_to(store.address, "prefill-0", transport="grpc", schema=WIDE)
    blocks = kv.blocks("r1", 4, WIDE)
    sending = asyncio.Event()

    async def stuck(self: BlockWriter, call: object) -> None:
        await sending.wait()  # a wire that takes nothing

    monkeypatch.setattr(BlockWriter, "_send", stuck)
    writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)
    writer._max_queued_bytes = 2**20
    pushing = asyncio.ensure_future(asyncio.to_thread(writer.push, 0, 0, blocks[:, 0]))
    await asyncio.sleep(0.05)
    assert not pushing.done()
    # the Push stream has not begun, so it is the writer's own abort that ends the wait
    aborting = asyncio.ensure_future(writer.abort(WorkerLost("the request was cancelled")))
    with pytest.raises(WorkerLost, match="the request was cancelled"):
        await pushing
    aborting.cancel()


async def test_push_on_the_event_loop_raises_instead_of_blocking_it(kv, start_store, attach_to) -> None:
    store = await start_store(num_slots=30_000)
    client = await attach_to(store.address, "prefill-0", transport="grpc", schema=WIDE)
    writer = await client.reserve("r1", 1, kv.keys("r1", 4), 4, 30)
    writer._max_queued_bytes = 2**20
    with pytest.raises(RuntimeError, match="engine's thread"):
        writer.push(0, 0, kv.blocks("r1", 4, WIDE)[:, 0])


async def test_pushes_from_several_threads_keep_the_order_of_each_block(kv, attach) -> None:
    client = await attach("prefill-0")
    blocks = kv.blocks("r1", 8)
    writer = await client.reserve("r1", 1, kv.keys("r1", 8), 8, 30)

    def push(block: int) -> None:
        for layer in range(3):
            writer.push(layer, block, blocks[block : block + 1, layer])

    threads = [threading.Thread(target=push, args=(block,)) for block in range(8)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), blocks)


async def test_the_array_is_the_callers_again_when_push_returns(kv, attach) -> None:
    client = await attach("prefill-0")
    blocks = kv.blocks("r1", 2)
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    buffer = np.empty((2, kv.schema.layer_bytes), np.uint8)

    def push() -> None:
        for layer in range(3):
            buffer[:] = blocks[:, layer]
            writer.push(layer, 0, buffer)
        buffer[:] = 0

    await asyncio.to_thread(push)
    await writer.seal(kv.state)
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), blocks)


async def test_push_refuses_wrong_shapes_and_layers_out_of_order(kv, attach) -> None:
    client = await attach("prefill-0")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    blocks = kv.blocks("r1", 2)
    for wrong in (blocks[:, 0, :-1], blocks[:, 0].astype(np.int8), blocks[0, 0]):
        with pytest.raises(ValueError, match="must be uint8"):
            writer.push(0, 0, wrong)
    with pytest.raises(InvalidRequest, match="layer 1 for block 0, which has 0 of 3 layers"):
        writer.push(1, 0, blocks[:, 1])
    with pytest.raises(InvalidRequest, match=r"blocks 1..2"):
        writer.push(0, 1, blocks[:, 0])
    writer.push(0, 0, blocks[:, 0])
    with pytest.raises(InvalidRequest, match="layer 0 for block 0, which has 1 of 3 layers"):
        writer.push(0, 0, blocks[:, 0])
    assert writer.failed is None


async def test_a_cancelled_seal_gives_the_hand_off_up(kv, store, attach) -> None:
    client = await attach("prefill-0")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    await kv.push(writer, kv.blocks("r1", 2))
    sealing = asyncio.ensure_future(writer.seal(kv.state))
    await asyncio.sleep(0)
    sealing.cancel()
    await asyncio.gather(sealing, return_exceptions=True)
    while store.accounting().num_leased or store.load().num_handoffs:
        await asyncio.sleep(0.005)


async def test_a_kept_lease_that_is_aborted_is_freed(kv, store, attach) -> None:
    client = await attach("prefill-0")
    writer = await client.cache(kv.keys("p", 4), 0)
    await writer.abort(WorkerLost("changed its mind"))
    while store.accounting().num_free != 8:
        await asyncio.sleep(0.005)
    with pytest.raises(WorkerLost):
        await writer.seal(kv.state)


async def test_a_seal_after_an_abort_raises_why(kv, store, attach) -> None:
    client = await attach("prefill-0")
    writer = await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    await kv.push(writer, kv.blocks("r1", 2))
    await client.abort("r1", 1, WorkerLost("decode-0 died"))
    # the same, whichever the writer hears first: the end of its stream, or the answer to its seal
    with pytest.raises(HandoffAborted, match="decode-0 died"):
        await writer.seal(kv.state)
    while store.accounting().num_free != 8:
        await asyncio.sleep(0.005)


def test_runs_are_the_gaps_between_present_blocks() -> None:
    assert _runs([], 0) == []
    assert _runs([False] * 3, 3) == [(0, 3)]
    assert _runs([True, False, False, True, False], 5) == [(1, 3), (4, 5)]
    assert _runs([True, True], 2) == []
    assert _runs([True], 3) == [(1, 3)]
