"""A decode worker that computes prompts itself, end to end on loopback, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from halfmoon.protocol.errors import DeadlineExceeded, HalfmoonError, PromptTooLong
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.v1 import common_pb2, control_pb2, worker_pb2
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


def chunk_sizes(engine: Any) -> dict[str, list[int]]:
    """By request id, of the steps that follow."""
    forward, found = engine.forward, {}

    def recorded(chunks: Any, **kwargs: Any) -> Any:
        for chunk in chunks:
            found.setdefault(chunk.sequence.request_id, []).append(chunk.num_tokens)
        return forward(chunks, **kwargs)

    engine.forward = recorded
    return found


async def error_of(cluster: Any, call: Any, answer: Any) -> HalfmoonError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await cluster.read(call, answer)
    return from_rpc_error(failure.value, "decode")


def sample(cluster: Any, name: str, **labels: str) -> float:
    return cluster.decode.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 64, 75, 200])
async def test_tokens_are_those_of_transformers(make_cluster: Any, greedy: Greedy, transport: str, num_tokens: int) -> None:
    cluster = await make_cluster(transport)
    answer = await cluster.run_local(prompt(num_tokens), max_tokens=20)
    assert answer.token_ids == greedy(prompt(num_tokens), 20)
    assert answer.finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert cluster.prefill.scheduler.at_rest
    await cluster.at_rest()


async def test_the_admission_tells_what_a_hand_off_would_have(make_cluster: Any) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.02)
    forward, second_may = cluster.decode.engine.forward, threading.Event()

    def held(chunks: Any, **kwargs: Any) -> Any:
        if all(chunk.num_tokens == 1 for chunk in chunks):
            second_may.wait(60)
        return forward(chunks, **kwargs)

    cluster.decode.engine.forward = held
    answer = cluster.answer()
    reading = asyncio.create_task(cluster.read(cluster.start_decode(cluster.sequence(prompt(40), max_tokens=6), local=True), answer))
    try:
        await until(lambda: answer.admitted is not None)  # the second token's step is no part of what it tells
    finally:
        second_may.set()
    await reading
    state = answer.admitted.state
    assert (state.num_tokens, state.num_cached_tokens, state.first_token) == (40, 0, answer.tokens[0])
    assert (state.phases.transport, state.phases.num_bytes_pushed, state.phases.push_s) == ("local", 0, 0)
    assert state.phases.prefill_s >= 0.02 and state.phases.queue_s > 0
    assert 0.02 <= state.phases.compute_s <= state.phases.prefill_s, "alone, it had the steps to itself"
    phases = answer.finished.phases
    assert (answer.admitted.handoff_wait_s, phases.handoff_wait_s, phases.intake_s, phases.queue_s) == (0, 0, 0, 0)
    assert 0.02 <= phases.first_decode_s < phases.decode_s


async def test_one_token_is_enough_and_an_end_of_sequence_token_ends_the_answer(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    tokens = greedy(prompt(12), 20)
    only = await cluster.run_local(prompt(12), max_tokens=1)
    assert (only.token_ids, only.finished.reason) == (tokens[:1], common_pb2.FINISH_REASON_LENGTH)
    for position in (0, 7):
        stop = tokens[position]
        answer = await cluster.run_local(prompt(12), max_tokens=20, stop_token_ids=(stop,))
        assert answer.token_ids == tokens[: tokens.index(stop) + 1]
        assert answer.finished.reason == common_pb2.FINISH_REASON_STOP
    await cluster.at_rest()


async def test_a_prompt_goes_in_chunks_of_the_budget(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 13})
    sizes = chunk_sizes(cluster.decode.engine)
    answer = await cluster.run_local(prompt(99), max_tokens=12)
    assert answer.token_ids == greedy(prompt(99), 12)
    assert sizes == {"r1": [13] * 7 + [8] + [1] * 11}


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_tokens", [64, 70])
async def test_a_prompt_seen_before_is_loaded_and_not_computed(make_cluster: Any, greedy: Greedy, transport: str, num_tokens: int) -> None:
    cluster = await make_cluster(transport, prefix_cache_hbm=False)
    first = await cluster.run_local(prompt(num_tokens), max_tokens=10)
    await cluster.at_rest()  # the answer's blocks are cached after its end
    sizes = chunk_sizes(cluster.decode.engine)
    again = await cluster.run_local(prompt(num_tokens), max_tokens=10)
    assert [answer.admitted.state.num_cached_tokens for answer in (first, again)] == [0, min(64, num_tokens - 1)]
    assert sizes["r2"] == [num_tokens - min(64, num_tokens - 1)] + [1] * 9
    assert again.token_ids == first.token_ids == greedy(prompt(num_tokens), 10)
    assert again.admitted.state.phases.num_bytes_loaded == 8 * cluster.decode.engine.schema.block_bytes
    assert again.admitted.state.phases.prefix_load_s > 0
    assert sample(cluster, "halfmoon_prefix_cache_queries_total", tier="local") == 128
    assert sample(cluster, "halfmoon_prefix_cache_hits_total", tier="local") == 64
    await cluster.at_rest()


async def test_the_very_next_turn_finds_prompt_and_answer_whoever_computed_them(
    make_cluster: Any, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfmoon.decode_worker.worker.CACHE_PATIENCE_S", 5.0)  # whatever else this machine does
    cluster = await make_cluster(prefix_cache_hbm=False)
    for first, second in ((cluster.run_local, cluster.run_local), (cluster.run_local, cluster.run), (cluster.run, cluster.run_local)):
        opening = prompt(20, cluster.num_requests)
        answer = await first(opening, max_tokens=30)
        turn = [*opening, *answer.token_ids, 5, 6, 7]
        following = await second(turn, max_tokens=5)
        assert following.admitted.state.num_cached_tokens == 48
        assert following.token_ids == greedy(turn, 5)
    await cluster.at_rest()


async def test_another_request_finds_a_prompts_blocks_while_it_is_still_being_answered(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.01)
    answer = cluster.answer()
    call = cluster.start_decode(cluster.sequence(prompt(60), max_tokens=190), local=True)
    reading = asyncio.create_task(cluster.read(call, answer))
    await until(lambda: cluster.store.stats().num_bytes_cached > 0)
    for run in (cluster.run_local, cluster.run):
        turn = [*prompt(60)[:56], *prompt(9, cluster.num_requests)]
        other = await run(turn, max_tokens=4)
        assert other.admitted.state.num_cached_tokens == 56
        assert other.token_ids == greedy(turn, 4)
    assert not reading.done()
    await reading
    assert answer.token_ids == greedy(prompt(60), 190)
    await cluster.at_rest()


async def test_a_prompt_preempted_while_it_is_published_leaves_nothing_wrong_in_the_store(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 160}, prefix_cache_hbm=False)
    scheduler, cache = cluster.decode.scheduler, cluster.decode.engine.cache
    read, schedule = cache.read_bytes, scheduler.schedule
    reading, taken = [], threading.Event()

    def take_the_pages_that_are_read(*limits: Any) -> Any:
        if not reading or taken.is_set():
            return schedule(*limits)
        victim = scheduler._running[0]
        scheduler._preempt(victim)
        cache.data[:, :, reading] = 7.0  # as another sequence would
        taken.set()
        step = schedule(*limits)
        return step._replace(preempted=[*step.preempted, victim.sequence])

    def read_what_was_taken(layer: int, pages: Any) -> Any:
        if not reading:
            reading.extend(pages)
            assert taken.wait(60)
        return read(layer, pages)

    scheduler.schedule, cache.read_bytes = take_the_pages_that_are_read, read_what_was_taken
    answer = await cluster.run_local(prompt(60), max_tokens=20)
    assert taken.is_set() and answer.token_ids == greedy(prompt(60), 20)
    assert answer.finished.phases.num_preemptions == 1
    await cluster.at_rest()
    again = await cluster.run_local(prompt(60), max_tokens=20)
    assert again.admitted.state.num_cached_tokens == 56 and again.token_ids == answer.token_ids
    assert sample(cluster, "halfmoon_prefix_load_failures_total", reason="handoff_corrupt") == 0


async def test_a_corrupt_prefix_is_computed_and_right_ever_after(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(flip_pushed_bytes=True, prefix_cache_hbm=False)
    await cluster.start_prefill(cluster.sequence(prompt(60)))  # its blocks are altered on their way to the store
    for num_cached_tokens, num_failures in ((0, 1), (56, 1)):
        answer = await cluster.run_local(prompt(60), max_tokens=10)
        assert answer.token_ids == greedy(prompt(60), 10)
        assert answer.admitted.state.num_cached_tokens == num_cached_tokens
        assert sample(cluster, "halfmoon_prefix_load_failures_total", reason="handoff_corrupt") == num_failures
        await until(lambda: cluster.decode.scheduler.at_rest)


async def test_a_store_that_is_gone_costs_the_prefix_only(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.01)
    answer = cluster.answer()
    call = cluster.start_decode(cluster.sequence(prompt(30), max_tokens=40), local=True)
    reading = asyncio.create_task(cluster.read(call, answer))
    waiting = cluster.answer()
    call = cluster.start_decode(cluster.sequence(prompt(200), max_tokens=5), local=True)
    late = asyncio.create_task(cluster.read(call, waiting))
    await until(lambda: bool(answer.token_ids))
    await cluster.store.stop(0.0)
    await asyncio.gather(reading, late)
    assert answer.token_ids == greedy(prompt(30), 40)
    assert waiting.token_ids == greedy(prompt(200), 5)
    after = await cluster.run_local(prompt(31), max_tokens=5)
    assert after.token_ids == greedy(prompt(31), 5) and after.admitted.state.num_cached_tokens == 0
    assert sample(cluster, "halfmoon_prefix_load_failures_total", reason="store_unavailable") == 1
    await until(lambda: cluster.decode.scheduler.at_rest)


async def test_running_sequences_get_their_own_tokens_while_a_prompt_is_computed_beside_them(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 8})
    cluster.decode.slow(0.005)
    sizes = chunk_sizes(cluster.decode.engine)
    running = cluster.sequence(prompt(20), max_tokens=60)
    answer = cluster.answer()
    decoding = cluster.start_decode(running)
    await cluster.start_prefill(running)
    reading = asyncio.create_task(cluster.read(decoding, answer))
    await until(lambda: len(answer.token_ids) > 2)
    local = await cluster.run_local(prompt(160), max_tokens=10)
    num_meanwhile = len(answer.token_ids)
    await reading
    assert local.token_ids == greedy(prompt(160), 10)
    assert answer.token_ids == greedy(prompt(20), 60)
    assert num_meanwhile >= 20, "a token a step, beside twenty chunks"
    assert sizes["r2"][:20] == [8] * 20
    await cluster.at_rest()


async def test_many_at_once_of_both_kinds_each_get_their_own_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 48}, decode={"max_running": 6, "max_prefill_tokens_per_step": 24})
    prompts = [prompt(5 + 9 * index, index) for index in range(16)]
    run = (cluster.run_local, cluster.run)
    answers = await asyncio.gather(*(run[index % 2](token_ids, max_tokens=8 + index) for index, token_ids in enumerate(prompts)))
    for index, (token_ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.token_ids == greedy(token_ids, 8 + index)
    await cluster.at_rest()


async def test_preempted_sequences_give_the_same_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 160, "max_prefill_tokens_per_step": 24})
    prompts = [prompt(30 + index, index) for index in range(4)]
    answers = await asyncio.gather(*(cluster.run_local(token_ids, max_tokens=60) for token_ids in prompts))
    for token_ids, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == greedy(token_ids, 60)
    assert sum(answer.finished.phases.num_preemptions for answer in answers) > 0
    await cluster.at_rest()


async def test_a_prompt_preempted_before_its_first_token_reports_nothing_as_cached(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 160, "max_prefill_tokens_per_step": 1})
    await cluster.run_local(prompt(100), max_tokens=1)
    await cluster.at_rest()
    first = asyncio.create_task(cluster.run_local(prompt(24, 1), max_tokens=120))
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    # 32 tokens of it are cached; before the other 72 are computed, the first one's growth takes its pages
    turn = [*prompt(100)[:32], *prompt(72, 2)]
    second = await cluster.run_local(turn, max_tokens=4)
    assert (await first).token_ids == greedy(prompt(24, 1), 120)
    assert second.token_ids == greedy(turn, 4)
    assert (second.finished.phases.num_preemptions, second.admitted.state.num_cached_tokens) == (1, 0)
    await cluster.at_rest()


async def test_a_seed_draws_what_it_draws_behind_a_hand_off_and_so_does_a_replay_of_half_the_answer(make_cluster: Any) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 16})
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": 24, "num_logprobs": 2}
    handed_off = await cluster.run(prompt(21), **sampling)
    first = await cluster.run_local(prompt(21), **sampling)
    assert first.token_ids == handed_off.token_ids
    assert first.token_ids != (await cluster.run_local(prompt(21), **{**sampling, "seed": 4321})).token_ids
    for num_sent in (1, 11, 23):
        replay = await cluster.run_local(prompt(21) + first.token_ids[:num_sent], num_prompt_tokens=21, **sampling)
        assert replay.token_ids == first.token_ids[num_sent:]
        expected = [token.logprob for token in first.tokens[num_sent:]]
        assert [token.logprob for token in replay.tokens] == pytest.approx(expected, abs=1e-3)
    assert all(len(token.top_logprobs) == 2 for token in first.tokens)


@pytest.mark.parametrize("phase", ["waiting for pages", "loading its prefix", "waiting for a chunk", "prefill", "decode"])
async def test_cancelling_frees_everything_long_before_the_last_token(make_cluster: Any, phase: str) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 264, "max_prefill_tokens_per_step": 8}, prefix_cache_hbm=False)
    scheduler = cluster.decode.scheduler
    await cluster.run_local(prompt(200), max_tokens=1)
    await cluster.at_rest()
    steps = cluster.decode.slow(0.05)
    others = []
    if phase == "waiting for pages":
        others = [cluster.start_decode(cluster.sequence(prompt(180, 1), max_tokens=4), local=True)]
        await until(lambda: scheduler.num_running == 1)
    if phase == "waiting for a chunk":
        others = [cluster.start_decode(cluster.sequence(prompt(100, 1), max_tokens=4), local=True)]
        await until(lambda: scheduler.num_running == 1)
    if phase == "loading its prefix":
        cluster.decode.transfer.submit(lambda: time.sleep(0.3))  # copies wait behind it
    token_ids = {"loading its prefix": prompt(200), "waiting for a chunk": prompt(120, 2)}.get(phase, prompt(200, 2))
    answer = cluster.answer()
    call = cluster.start_decode(cluster.sequence(token_ids, max_tokens=40), local=True)
    reading = asyncio.create_task(cluster.read(call, answer))
    if phase == "waiting for pages":
        await until(lambda: scheduler.num_waiting == 1)
    elif phase == "loading its prefix":
        await until(lambda: cluster.store.stats().num_leases == 1)
    elif phase == "waiting for a chunk":
        await until(lambda: scheduler.num_running == 2)
        assert len(cluster.decode.half._local._unbegun) == 1
    elif phase == "prefill":
        await until(lambda: any(0 < sequence.num_computed_tokens < 200 for sequence in cluster.decode.half._jobs))
    else:
        await until(lambda: len(answer.token_ids) > 1)
    assert cluster.held()
    num_steps = len(steps)
    for running in (call, *others):
        running.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await cluster.at_rest()
    assert len(steps) - num_steps < 30, "of more than 38 that were left to the last token"
    load = cluster.decode.load()
    del load.steps[:]
    assert load == control_pb2.MemberLoad()
    assert cluster.decode.half._local._unbegun == {}


async def test_stop_before_the_first_token_ends_it_and_keeps_what_was_computed(make_cluster: Any) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 8})
    cluster.decode.slow(0.02)
    sequence = cluster.sequence(prompt(200), max_tokens=40)
    answer = cluster.answer()
    reading = asyncio.create_task(cluster.read(cluster.start_decode(sequence, local=True), answer))
    await until(lambda: any(held.num_computed_tokens >= 32 for held in cluster.decode.half._jobs))
    assert (await cluster.decode_stub.Stop(worker_pb2.StopRequest(request_id=sequence.request_id))).found
    await reading
    assert (answer.token_ids, answer.finished.reason) == ([], common_pb2.FINISH_REASON_STOP)
    await cluster.at_rest()
    again = await cluster.run_local(prompt(40), max_tokens=1)
    assert 32 <= (await cluster.run_local(prompt(200), max_tokens=1)).admitted.state.num_cached_tokens < 200
    assert again.admitted.state.num_cached_tokens == 0, "another prompt"


async def test_a_deadline_says_where_it_found_the_request(make_cluster: Any) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 264, "max_prefill_tokens_per_step": 8})
    cluster.decode.slow(0.1)  # 25 steps
    computing = cluster.start_decode(cluster.sequence(prompt(200), deadline_s=1.5), local=True)
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    queued = cluster.start_decode(cluster.sequence(prompt(100), deadline_s=0.1), local=True)
    errors = await asyncio.gather(*(error_of(cluster, call, cluster.answer()) for call in (queued, computing)))
    assert all(isinstance(error, DeadlineExceeded) for error in errors)
    assert "waiting for the decode worker's pages" in errors[0].message
    assert "in prefill on the decode worker" in errors[1].message
    await cluster.at_rest()


async def test_a_prompt_that_can_never_fit_is_refused(make_cluster: Any) -> None:
    cluster = await make_cluster(decode={"kv_capacity_tokens": 64})
    call = cluster.start_decode(cluster.sequence(prompt(50), max_tokens=15), local=True)
    assert isinstance(await error_of(cluster, call, cluster.answer()), PromptTooLong)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
async def test_any_mix_of_cancelled_calls_returns_to_rest(make_cluster: Any, greedy: Greedy, transport: str) -> None:
    cluster = await make_cluster(transport, arena_bytes=2**19, decode={"kv_capacity_tokens": 256, "max_prefill_tokens_per_step": 16})
    cluster.decode.slow(0.002)
    rng = random.Random(transport)

    async def cancelled(index: int) -> None:
        sequence = cluster.sequence(prompt(rng.randrange(1, 120), index % 5), max_tokens=rng.randrange(1, 60))
        call = cluster.start_decode(sequence, local=True)
        await asyncio.sleep(rng.random() * 0.3)
        call.cancel()

    async def finished(index: int) -> None:
        token_ids = prompt(30 + index, index)
        run = cluster.run if index % 3 == 0 else cluster.run_local
        assert (await run(token_ids, max_tokens=15)).token_ids == greedy(token_ids, 15)

    async with asyncio.timeout(100.0):
        await asyncio.gather(*(cancelled(index) for index in range(30)), *(finished(index) for index in range(6)))
    await cluster.at_rest()
