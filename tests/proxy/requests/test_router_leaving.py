"""The router over scripted peers: the client goes, or has all that it wanted."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from halfmoon.protocol.errors import (
    RequestCancelled,
)
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.request import Finished, RequestState
from halfmoon.tests.waiting import within

# The client leaves


async def leave_by_cancel(bench: Any, stream: Any, task: asyncio.Task[Any] | None) -> None:
    await stream.cancel("asked to")


async def leave_by_aclose(bench: Any, stream: Any, task: asyncio.Task[Any] | None) -> None:
    await stream.aclose()


async def leave_by_id(bench: Any, stream: Any, task: asyncio.Task[Any] | None) -> None:
    assert bench.router.cancel(stream.request_id, "Cancel was called")
    assert not bench.router.cancel("unknown", "Cancel was called")


@pytest.mark.parametrize("leave", [leave_by_cancel, leave_by_aclose, leave_by_id])
@pytest.mark.parametrize("state", [RequestState.QUEUED, RequestState.PREFILL, RequestState.HANDOFF, RequestState.DECODE])
async def test_a_client_that_goes_frees_both_workers(bench: Any, peers: Any, leave: Any, state: RequestState) -> None:
    prefill, decode = bench.prefills[0], bench.decodes[0]
    if state is RequestState.PREFILL:
        prefill.before_seal = peers.forever
    elif state is RequestState.HANDOFF:

        async def seal_elsewhere(request: Any) -> None:
            await decode.arrived.wait()
            request.handoff.id = "unknown to decode"

        prefill.before_seal = seal_elsewhere
    else:
        decode.before_token = lambda index: peers.forever() if index == 2 else asyncio.sleep(0)
    stream = bench.router.open(bench.request())
    if state is RequestState.DECODE:
        await within(2, anext(stream))
    while stream.state is not state:
        await asyncio.sleep(0.01)
    if state is RequestState.PREFILL:
        await within(2, asyncio.gather(prefill.arrived.wait(), decode.arrived.wait()))
    await leave(bench, stream, None)
    assert stream.state is RequestState.ABORTED
    if state is not RequestState.QUEUED:
        await within(1, decode.cancelled.wait())
        if state is not RequestState.DECODE:
            await within(1, bench.stores[0].aborted.wait())
    if state is RequestState.PREFILL:
        await within(1, prefill.cancelled.wait())
    if state is RequestState.QUEUED:
        await asyncio.sleep(0.05)
        assert prefill.requests == [] and decode.requests == []
    assert bench.sample("halfmoon_requests_total", outcome="aborted", reason="request_cancelled") == 1
    bench.assert_at_rest()
    with pytest.raises(RequestCancelled):
        await within(1, peers.read(stream))
    await stream.cancel("again")
    assert bench.sample("halfmoon_requests_total", outcome="aborted", reason="request_cancelled") == 1


async def test_a_cancel_in_the_moment_of_the_start_reaches_both_calls(bench: Any, peers: Any) -> None:
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(bench.request())
    await asyncio.sleep(0)  # the calls are made, nobody waits on them yet
    assert stream.state is RequestState.PREFILL
    await stream.cancel("at once")
    await asyncio.sleep(0.2)
    for peer in (bench.prefills[0], bench.decodes[0]):
        if peer.requests:
            await within(1, peer.cancelled.wait())
    bench.assert_at_rest()


async def test_a_cancelled_task_and_a_dropped_stream_are_cancels(bench: Any, peers: Any) -> None:
    bench.prefills[0].before_seal = peers.forever
    reader = asyncio.create_task(peers.read(bench.router.open(bench.request())))
    await within(2, bench.prefills[0].arrived.wait())
    reader.cancel()
    await within(1, bench.prefills[0].cancelled.wait())
    bench.assert_at_rest()
    del reader

    bench.prefills[0].arrived.clear()
    bench.prefills[0].cancelled.clear()
    stream = bench.router.open(bench.request())
    await within(2, bench.prefills[0].arrived.wait())
    del stream
    gc.collect()
    await within(1, bench.prefills[0].cancelled.wait())
    bench.assert_at_rest()


async def test_tokens_that_came_before_an_error_are_delivered_before_it(bench: Any, peers: Any) -> None:
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 3 else asyncio.sleep(0)
    request = bench.request()
    stream = bench.router.open(request)
    while len(stream._runner.events) < 3:
        await asyncio.sleep(0.01)
    await stream.cancel("asked to")
    events = [await anext(stream) for _ in range(3)]
    assert [event.token_ids[0] for event in events] == peers.answer(request)[:3]
    with pytest.raises(RequestCancelled, match="asked to"):
        await anext(stream)


# stop()


async def test_stop_ends_as_done_and_counts_what_was_taken(bench: Any, peers: Any) -> None:
    gate = asyncio.Event()
    bench.decodes[0].before_token = lambda index: gate.wait() if index == 4 else asyncio.sleep(0)
    stream = bench.router.open(bench.request())
    for _ in range(2):
        await within(2, anext(stream))
    stopping = asyncio.create_task(stream.stop())
    await within(2, bench.decodes[0].stops[stream.request_id].wait())
    gate.set()
    finished = await within(2, stopping)
    assert isinstance(finished, Finished) and finished.reason == common_pb2.FINISH_REASON_STOP
    assert finished.usage.num_completion_tokens == 2
    assert finished.phases.decode_s == 0.03125, "decode's own Finished was waited for"
    assert not bench.decodes[0].cancelled.is_set()
    assert stream.state is RequestState.DONE
    assert await stream.stop() == finished
    assert bench.sample("halfmoon_requests_total", outcome="done", reason="stop") == 1
    bench.assert_at_rest()


async def test_stop_is_done_even_where_decode_dies_of_it(bench: Any, peers: Any) -> None:
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 2 else asyncio.sleep(0)
    stream = bench.router.open(bench.request())
    await within(2, anext(stream))
    stopping = asyncio.create_task(stream.stop())
    await within(2, bench.decodes[0].stops[stream.request_id].wait())
    await bench.decodes[0].kill()
    finished = await within(2, stopping)
    assert finished.reason == common_pb2.FINISH_REASON_STOP and finished.usage.num_completion_tokens == 1
    bench.assert_at_rest()
