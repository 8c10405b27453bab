"""The router over scripted peers: what a request goes through, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from halfmoon.protocol.errors import (
    DeadlineExceeded,
    Draining,
    HandoffCorrupt,
    InternalError,
    InvalidRequest,
    NoWorker,
    Overloaded,
    StoreFull,
    StoreUnavailable,
    WorkerLost,
)
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.request import RequestState, Tokens
from halfmoon.tests.waiting import within


async def test_a_request_gets_its_tokens_in_order_and_its_phase_record(bench: Any, peers: Any) -> None:
    request, began = bench.request(), time.monotonic()
    stream = bench.router.open(request)
    assert stream.state is RequestState.QUEUED
    token_ids, finished = await within(5, peers.read(stream))
    elapsed_s = time.monotonic() - began
    assert token_ids == peers.answer(request)
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert finished.usage == common_pb2.Usage(num_prompt_tokens=10, num_completion_tokens=6, num_cached_tokens=4)
    record = finished.phases
    assert (record.prefill_queue_s, record.prefix_load_s, record.prefill_s, record.push_s) == (0.25, 0.5, 0.75, 0.125)
    assert (record.first_decode_s, record.decode_s, record.num_preemptions) == (0.0625, 0.03125, 1)
    assert (record.prefill_worker, record.decode_worker, record.transport) == ("prefill-0", "decode-0", "shm")
    assert (record.num_attempts, record.num_bytes_pushed) == (1, 1000)
    assert 0 < record.queue_s <= record.prefill_done_s <= record.ttft_s <= record.e2e_s <= elapsed_s
    assert record.tpot_s == pytest.approx((record.e2e_s - record.ttft_s) / 5)
    assert stream.state is RequestState.DONE
    bench.assert_at_rest()


async def test_both_legs_carry_the_request_its_deadline_and_the_same_hand_off(bench: Any, peers: Any) -> None:
    request, began = bench.request(timeout_s=600.0), time.monotonic()
    await within(5, peers.read(bench.router.open(request)))
    elapsed_s = time.monotonic() - began
    (prefill,), (decode,) = bench.prefills[0].requests, bench.decodes[0].requests
    assert prefill.sequence == decode.sequence and prefill.handoff == decode.handoff
    assert prefill.store_address == bench.stores[0].address
    assert prefill.handoff.epoch == 1 and prefill.handoff.id
    sequence = prefill.sequence
    assert list(sequence.token_ids) == request.token_ids and sequence.num_prompt_tokens == 10
    assert 600 - elapsed_s <= sequence.deadline_s <= 600 and sequence.request_id == request.request_id and sequence.sampling.seed == 7


async def test_every_number_is_observed_once_and_is_the_record_s(bench: Any, peers: Any) -> None:
    _, finished = await within(5, peers.read(bench.router.open(bench.request())))
    for name, value in (
        ("halfmoon_time_to_first_token_seconds", finished.phases.ttft_s),
        ("halfmoon_time_to_prefill_done_seconds", finished.phases.prefill_done_s),
        ("halfmoon_time_per_output_token_seconds", finished.phases.tpot_s),
        ("halfmoon_e2e_request_latency_seconds", finished.phases.e2e_s),
    ):
        assert bench.sample(f"{name}_count") == 1
        assert bench.sample(f"{name}_sum") == pytest.approx(value)
    assert bench.sample("halfmoon_inter_token_latency_seconds_count") == 5
    assert bench.sample("halfmoon_inter_token_latency_seconds_sum") == pytest.approx(finished.phases.e2e_s - finished.phases.ttft_s)
    for phase in ("queue", "prefill_queue", "prefix_load", "prefill", "push", "handoff_wait", "first_decode", "decode"):
        assert bench.sample("halfmoon_request_phase_seconds_count", phase=phase) == 1
        assert bench.sample("halfmoon_request_phase_seconds_sum", phase=phase) == pytest.approx(getattr(finished.phases, f"{phase}_s"))
    assert bench.sample("halfmoon_requests_total", outcome="done", reason="length") == 1
    for state in ("queued", "prefill", "handoff", "decode", "done"):
        assert bench.sample("halfmoon_request_transitions_total", state=state) == 1
    assert bench.sample("halfmoon_placements_total", policy="least_loaded") == 1
    assert bench.sample("halfmoon_generation_tokens_total") == 6
    assert bench.sample("halfmoon_prompt_tokens_total") == 10
    assert bench.metrics.ttft_window.percentiles().count == 1


async def test_states_follow_what_the_workers_report(bench: Any, peers: Any) -> None:
    seal, token = asyncio.Event(), asyncio.Event()
    bench.prefills[0].before_seal = lambda _: seal.wait()
    bench.decodes[0].before_token = lambda _: token.wait()
    stream = bench.router.open(bench.request())
    await within(2, bench.prefills[0].arrived.wait())
    assert stream.state is RequestState.PREFILL
    assert (bench.router.num_queued, bench.router.num_running) == (1, 0)
    seal.set()
    token.set()
    assert isinstance(await within(2, anext(stream)), Tokens)
    assert stream.state in (RequestState.DECODE, RequestState.DONE)
    await within(2, peers.read(stream))


async def test_two_hundred_requests_at_once_all_get_their_own_tokens(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 2)
    requests = [bench.request([n, n + 1, n + 2], max_tokens=5) for n in range(200)]
    results = await within(20, asyncio.gather(*(peers.read(bench.router.open(request)) for request in requests)))
    assert [token_ids for token_ids, _ in results] == [peers.answer(request) for request in requests]
    assert len(bench.decodes[0].requests) == len(bench.decodes[1].requests) == 100
    bench.assert_at_rest()


# Failure and replay


async def test_a_prefill_worker_that_dies_is_replaced_and_decode_is_told_at_once(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1)
    dying = bench.prefills[0]
    dying.before_seal = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, dying.arrived.wait())
    await within(2, bench.decodes[0].arrived.wait())
    await dying.kill()
    token_ids, finished = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request)
    assert finished.phases.num_attempts == 2 and finished.phases.prefill_worker == "prefill-1"
    assert bench.decodes[0].cancelled.is_set()
    assert [decode.handoff.epoch for decode in bench.decodes[0].requests] == [1, 2]
    handoff, reason = bench.stores[0].aborts[0]
    assert handoff.epoch == 1 and isinstance(reason, WorkerLost) and "prefill-0" in reason.message
    assert bench.sample("halfmoon_request_replays_total", reason="worker_lost") == 1
    bench.assert_at_rest()


@pytest.mark.parametrize("sent", [0, 1, 3])
async def test_a_decode_worker_that_dies_costs_a_replay_with_exactly_the_sent_tokens(make_bench: Any, peers: Any, sent: int) -> None:
    bench = await make_bench(1, 2)
    dying = bench.decodes[0]
    reached = asyncio.Event()

    async def stand_still(index: int) -> None:
        if index == sent:
            reached.set()
            await peers.forever()

    dying.before_token = stand_still
    request = bench.request()
    stream = bench.router.open(request)
    first = await within(2, peers.take(stream, sent))
    await within(2, reached.wait())
    await dying.kill()
    rest, finished = await within(2, peers.read(stream))
    assert first + rest == peers.answer(request)
    (replay,) = bench.decodes[1].requests
    assert list(replay.sequence.token_ids) == request.token_ids + first
    assert replay.sequence.num_prompt_tokens == 10 and replay.handoff.epoch == 2
    assert bench.prefills[0].requests[1].sequence == replay.sequence
    assert finished.usage.num_completion_tokens == 6 and finished.phases.decode_worker == "decode-1"
    assert finished.phases.num_attempts == 2
    assert bench.sample("halfmoon_time_to_first_token_seconds_count") == 1
    bench.assert_at_rest()


async def test_a_member_that_leaves_the_cluster_is_lost_before_its_call_fails(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2)
    silent = bench.decodes[0]
    silent.before_token = peers.forever  # its server lives and says nothing
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, silent.arrived.wait())
    await silent.leave()
    token_ids, _ = await within(1, peers.read(stream))
    assert token_ids == peers.answer(request)
    await within(1, silent.cancelled.wait())


async def test_a_prefill_worker_that_leaves_after_its_hand_off_was_taken_does_no_harm(bench: Any, peers: Any) -> None:
    gate = asyncio.Event()

    async def pause(index: int) -> None:
        if index == 2:
            await gate.wait()

    bench.decodes[0].before_token = pause
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, anext(stream))
    await bench.prefills[0].kill()
    await bench.stores[0].kill()
    gate.set()
    rest, finished = await within(2, peers.read(stream))
    assert rest == peers.answer(request)[1:] and finished.phases.num_attempts == 1


async def test_a_prefill_worker_that_dies_between_the_admission_and_its_reply_does_no_harm(bench: Any, peers: Any) -> None:
    """Decode has the hand-off: nothing is missing but the word that it is there."""
    gate = asyncio.Event()

    async def pause(index: int) -> None:
        if index == 2:
            await gate.wait()

    bench.prefills[0].before_reply = peers.forever
    bench.decodes[0].before_token = pause
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, anext(stream))
    await bench.prefills[0].kill()
    gate.set()
    rest, finished = await within(2, peers.read(stream))
    assert rest == peers.answer(request)[1:] and finished.phases.num_attempts == 1
    bench.assert_at_rest()


async def test_a_server_that_dies_before_its_join_stream_does_is_excluded_all_the_same(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2)
    await bench.decodes[0].server.stop(None)  # it is a member still
    request = bench.request()
    token_ids, finished = await within(3, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request)
    assert finished.phases.num_attempts == 2 and finished.phases.decode_worker == "decode-1"


async def test_an_error_that_another_pair_cannot_mend_is_the_client_s_at_once(bench: Any, peers: Any) -> None:
    async def refuse(_: Any) -> None:
        await bench.decodes[0].arrived.wait()  # a call that was cancelled before it arrived would be seen by nobody
        raise InvalidRequest("token 99 is out of the vocabulary", param="prompt")

    bench.prefills[0].before_seal = refuse
    stream = bench.router.open(bench.request())
    with pytest.raises(InvalidRequest, match="token 99") as caught:
        await within(2, peers.read(stream))
    assert caught.value.fields == {"param": "prompt"}
    await within(1, bench.decodes[0].cancelled.wait())
    assert len(bench.prefills[0].requests) == 1
    assert bench.sample("halfmoon_requests_total", outcome="failed", reason="invalid_request") == 1


async def test_both_legs_failing_is_one_failure(bench: Any, peers: Any) -> None:
    async def corrupt(_: int) -> None:
        raise HandoffCorrupt("block 3 does not match its checksum")

    async def full(_: Any) -> None:
        raise StoreFull("no block can be evicted")

    bench.prefills[0].before_seal = full
    bench.decodes[0].before_token = corrupt
    with pytest.raises((HandoffCorrupt, StoreFull), match=r"attempt 3 of 3"):
        await within(3, peers.read(bench.router.open(bench.request())))
    assert len(bench.prefills[0].requests) == 3
    assert bench.sample("halfmoon_requests_total", outcome="failed", reason="store_full") == 1
    bench.assert_at_rest()


async def test_attempts_are_limited(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(max_attempts=2)

    async def corrupt(_: int) -> None:
        raise HandoffCorrupt("block 3 does not match its checksum")

    bench.decodes[0].before_token = corrupt
    with pytest.raises(HandoffCorrupt, match=r"block 3 .*attempt 2 of 2"):
        await within(3, peers.read(bench.router.open(bench.request())))
    assert [request.handoff.epoch for request in bench.decodes[0].requests] == [1, 2]


async def test_a_hand_off_that_decode_refuses_is_computed_by_another_prefill_worker(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1)
    num_failures = 0

    async def corrupt_once(_: int) -> None:
        nonlocal num_failures
        num_failures += 1
        if num_failures == 1:
            raise HandoffCorrupt("block 3 does not match its checksum")

    bench.decodes[0].before_token = corrupt_once
    _, finished = await within(3, peers.read(bench.router.open(bench.request())))
    assert finished.phases.prefill_worker == "prefill-1"


@pytest.mark.parametrize("last", ["length", "eos", "stop_token"])
async def test_a_sequence_whose_finished_was_lost_is_not_replayed_for_one_token_more(make_bench: Any, peers: Any, last: str) -> None:
    prompt = [5, 6, 7]
    third = peers.token_at(prompt, 2)
    options: dict[str, Any] = {"length": {"max_tokens": 3}, "eos": {}, "stop_token": {"stop_token_ids": (third,)}}[last]
    bench = await make_bench(1, 2, eos_token_ids=frozenset({third} if last == "eos" else {peers.EOS}))
    dying = bench.decodes[0]
    if last == "length":
        dying.before_finished = peers.forever
    else:
        dying.before_token = lambda index: peers.forever() if index == 3 else asyncio.sleep(0)
    stream = bench.router.open(bench.request(prompt, **options))
    first = await within(2, peers.take(stream, 3))
    await dying.kill()
    rest, finished = await within(2, peers.read(stream))
    assert rest == [] and first == [peers.token_at(prompt, index) for index in range(3)]
    assert finished.reason == (common_pb2.FINISH_REASON_LENGTH if last == "length" else common_pb2.FINISH_REASON_STOP)
    assert bench.decodes[1].requests == []


# Deadline


@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_a_deadline_ends_the_request_and_frees_both_workers(bench: Any, peers: Any, where: str) -> None:
    if where == "prefill":
        bench.prefills[0].before_seal = peers.forever
    else:  # the first token comes with the admission
        bench.decodes[0].before_token = lambda index: peers.forever() if index else asyncio.sleep(0)
    stream = bench.router.open(bench.request(timeout_s=2.0))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"2 s ran out in state {where}"):
        await within(2, peers.read(stream))
    assert time.monotonic() - started > 1.0
    await within(1, bench.decodes[0].cancelled.wait())
    if where == "prefill":
        await within(1, bench.prefills[0].cancelled.wait())
        await within(1, bench.stores[0].aborted.wait())
        assert isinstance(bench.stores[0].aborts[0][1], DeadlineExceeded)
    assert bench.sample("halfmoon_requests_total", outcome="failed", reason="deadline_exceeded") == 1
    bench.assert_at_rest()


async def test_a_bug_in_a_leg_ends_the_request_and_does_not_hang_it(bench: Any, peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("nothing of the kind")

    monkeypatch.setattr(bench.router.learner, "handed_off", broken)
    with pytest.raises(InternalError, match="KeyError"):
        await within(1, peers.read(bench.router.open(bench.request())))
    bench.assert_at_rest()


# Admission


async def test_a_full_queue_says_when_to_come_back(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(max_queued_requests=2)
    gate = asyncio.Event()
    bench.prefills[0].before_seal = lambda _: gate.wait()
    streams = [bench.router.open(bench.request()) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests wait") as caught:
        bench.router.open(bench.request())
    assert caught.value.retry_after_s >= 1
    assert bench.sample("halfmoon_requests_total", outcome="rejected", reason="overloaded") == 1
    assert bench.sample("halfmoon_requests_waiting") == 2
    gate.set()
    for stream in streams:
        await within(2, peers.read(stream))
    await within(2, peers.read(bench.router.open(bench.request())))


async def test_queued_tokens_are_bounded_but_a_long_prompt_alone_is_let_in(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(max_queued_tokens=15)
    bench.prefills[0].before_seal = peers.forever
    long = bench.router.open(bench.request(list(range(40))))
    with pytest.raises(Overloaded, match="40 prompt tokens"):
        bench.router.open(bench.request([1]))
    await long.cancel("done with it")
    first = bench.router.open(bench.request())
    with pytest.raises(Overloaded):
        bench.router.open(bench.request())
    await first.cancel("done with it")


async def test_a_request_with_a_first_token_leaves_the_queue(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(max_queued_requests=1)
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 1 else asyncio.sleep(0)
    streams = [bench.router.open(bench.request())]
    await within(2, anext(streams[0]))
    streams.append(bench.router.open(bench.request()))
    assert (bench.router.num_queued, bench.router.num_running) == (1, 1)
    for stream in streams:
        await stream.aclose()


async def test_without_a_worker_nothing_starts(make_bench: Any) -> None:
    bench = await make_bench(0, 0)
    with pytest.raises(NoWorker, match="no worker has joined"):
        bench.router.open(bench.request())
    await bench.add("prefill", bench.stores[0])
    with pytest.raises(NoWorker, match="no live decode worker"):
        bench.router.open(bench.request())
    assert bench.sample("halfmoon_requests_total", outcome="rejected", reason="no_worker") == 2


async def test_a_request_id_under_way_is_refused(bench: Any, peers: Any) -> None:
    request = bench.request()
    stream = bench.router.open(request)
    assert bench.router.streams[request.request_id] is stream
    with pytest.raises(InvalidRequest, match="under way"):
        bench.router.open(request)
    await within(2, peers.read(stream))
    assert request.request_id not in bench.router.streams
    first = bench.decodes[0].requests[0].handoff.id
    await within(2, peers.read(bench.router.open(request)))
    assert bench.decodes[0].requests[1].handoff.id != first, "an aborted epoch of the first would refuse the second"


async def test_draining_admits_no_more_and_waits_for_the_last(bench: Any, peers: Any) -> None:
    gate = asyncio.Event()
    bench.decodes[0].before_token = lambda index: gate.wait() if index == 1 else asyncio.sleep(0)
    reading = asyncio.create_task(peers.read(bench.router.open(bench.request())))
    draining = asyncio.create_task(bench.router.drain(600))
    await asyncio.sleep(0.05)
    assert not draining.done()
    with pytest.raises(Draining):
        bench.router.open(bench.request())
    gate.set()
    assert await within(2, draining) == 0
    await within(2, reading)


async def test_a_drain_that_is_over_ends_what_is_left_and_replays_nothing(bench: Any, peers: Any) -> None:
    gate = asyncio.Event()
    bench.decodes[0].before_token = lambda index: gate.wait() if index == 1 else asyncio.sleep(0)
    reading = asyncio.create_task(peers.read(bench.router.open(bench.request())))
    assert await bench.router.drain(0.05) == 1
    with pytest.raises(Draining, match=r"0\.05 s is over"):
        await within(2, reading)
    assert bench.router.num_running == bench.router.num_queued == 0
    assert sum(len(decode.requests) for decode in bench.decodes) == 1
    gate.set()


async def test_a_worker_that_comes_back_serves_again(bench: Any, peers: Any) -> None:
    decode = bench.decodes[0]
    await decode.kill()
    while "decode-0" in bench.cluster.members:
        await asyncio.sleep(0.01)
    with pytest.raises(NoWorker):
        bench.router.open(bench.request())
    await bench.join(decode)
    request = bench.request()
    token_ids, _ = await within(3, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request)


async def test_what_was_placed_counts_as_load_before_any_report(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 2)
    for prefill in bench.prefills:
        prefill.before_seal = peers.forever
    streams = [bench.router.open(bench.request(list(range(length)))) for length in (40, 10, 10, 10)]
    while sum(len(peer.requests) for peer in (*bench.prefills, *bench.decodes)) < 8:
        await asyncio.sleep(0.01)
    assert [len(prefill.requests) for prefill in bench.prefills] == [1, 3], "tokens are balanced, not requests"
    assert [len(decode.requests) for decode in bench.decodes] == [1, 3]
    for stream in streams:
        await stream.aclose()
    bench.assert_at_rest()


async def test_store_unavailable_from_a_worker_is_tried_again(make_bench: Any, peers: Any) -> None:
    bench = await make_bench()
    num_failures = 0

    async def fail_once(_: Any) -> None:
        nonlocal num_failures
        num_failures += 1
        if num_failures == 1:
            raise StoreUnavailable("store-0 does not answer")

    bench.prefills[0].before_seal = fail_once
    request = bench.request()
    token_ids, finished = await within(3, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 2
