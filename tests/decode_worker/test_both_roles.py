"""Workers of both roles, end to end on loopback, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.protocol.errors import RequestCancelled
from halfmoon.protocol.v1 import control_pb2
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


def forwards(engine: Any, seconds: float = 0.0, gate: threading.Event | None = None) -> list[list[tuple[str, int, int]]]:
    """(request id, start, tokens) of every chunk of the steps that follow, each of which takes that much longer and waits for the gate."""
    forward, found = engine.forward, []

    def recorded(chunks: Any, **hooks: Any) -> Any:
        time.sleep(seconds)
        assert gate is None or gate.wait(60)
        found.append([(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in chunks])
        return forward(chunks, **hooks)

    engine.forward = recorded
    return found


@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("num_workers", [1, 2])
async def test_tokens_are_those_of_transformers_with_and_without_a_hand_off(
    make_cluster: Any, greedy: Greedy, transport: str, num_workers: int
) -> None:
    """One worker hands off to itself, by way of its store."""
    cluster = await make_cluster(transport, both=num_workers)
    for num_tokens in (1, 8, 75, 200):
        assert (await cluster.run(prompt(num_tokens), max_tokens=20)).token_ids == greedy(prompt(num_tokens), 20)
        assert (await cluster.run_local(prompt(num_tokens, 1), max_tokens=20)).token_ids == greedy(prompt(num_tokens, 1), 20)
    await cluster.at_rest()


async def test_one_step_holds_decode_tokens_a_prompt_of_its_own_and_one_to_hand_off(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(both=1, decode={"max_prefill_tokens_per_step": 24})
    gate = threading.Event()
    gate.set()
    steps = forwards(cluster.decode.engine, 0.002, gate)
    decoding = asyncio.create_task(cluster.run(prompt(20), max_tokens=100))  # r1
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    gate.clear()
    others = [asyncio.create_task(cluster.run(prompt(90, 1), max_tokens=4))]  # r2
    await until(lambda: cluster.decode.worker.prefill.scheduler.waiting_chunks)
    others.append(asyncio.create_task(cluster.run_local(prompt(9, 2), max_tokens=4)))  # r3
    await until(lambda: cluster.decode.scheduler.num_running == 2)
    gate.set()
    answers = await asyncio.gather(*others)
    assert [answer.token_ids for answer in answers] == [greedy(prompt(90, 1), 4), greedy(prompt(9, 2), 4)]
    assert (await decoding).token_ids == greedy(prompt(20), 100)
    mixed = [{name: size for name, _, size in step} for step in steps]
    assert {"r1": 1, "r3": 9, "r2": 8} in mixed, "all three in one forward: 24 - 9 tokens hold one block of 8"
    beside = [sum(size for size in step.values() if size > 1) for step in mixed if step.get("r1") == 1]
    assert max(beside) == 24, "the budget beside decode tokens, used and not passed"
    computed = [position for step in steps for name, start, size in step if name == "r2" for position in range(start, start + size)]
    assert computed[:90] == list(range(90)), "each token of the prompt once"
    await cluster.at_rest()


async def test_many_requests_of_every_kind_at_once_each_get_their_own_tokens(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(both=1, prefill={"max_tokens_per_step": 48}, decode={"max_running": 6, "kv_capacity_tokens": 512})
    prompts = [prompt(5 + 9 * index, index) for index in range(16)]
    runs = [cluster.run_local if index % 3 == 0 else cluster.run for index in range(16)]
    answers = await asyncio.gather(
        *(run(tokens, max_tokens=8 + index) for index, (run, tokens) in enumerate(zip(runs, prompts, strict=True)))
    )
    for index, (tokens, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.token_ids == greedy(tokens, 8 + index)
    await cluster.at_rest()


async def test_any_mix_of_cancelled_calls_returns_to_rest(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(both=1, arena_bytes=2**19, prefill={"max_tokens_per_step": 24}, decode={"kv_capacity_tokens": 512})
    rng = random.Random(11)
    client = cluster.decode.worker.stores.own.client

    async def cancelled(index: int) -> None:
        sequence = cluster.sequence(prompt(rng.randrange(1, 120), index % 5), max_tokens=rng.randrange(1, 60))
        local = index % 3 == 0
        calls = [cluster.start_decode(sequence, local=local), *([] if local else [cluster.start_prefill(sequence)])]
        rng.shuffle(calls)
        for call in calls:
            await asyncio.sleep(rng.random() * 0.1)
            call.cancel()
        # it may have been sealed before either call was cancelled, and decode may never have come
        await client.abort(sequence.request_id, 1, RequestCancelled("the client went away"))

    async def finished(index: int) -> None:
        tokens = prompt(30 + index, index)
        assert (await cluster.run(tokens, max_tokens=15)).token_ids == greedy(tokens, 15)

    async with asyncio.timeout(100.0):
        await asyncio.gather(*(cancelled(index) for index in range(30)), *(finished(index) for index in range(6)))
    await cluster.at_rest()


async def test_hand_offs_that_fill_the_store_do_not_lock_the_halves_out_of_pages(make_cluster: Any, greedy: Greedy) -> None:
    """Prompts that hold pages wait for room in the store, which is full of hand-offs that wait for pages."""
    cluster = await make_cluster(both=1, arena_bytes=2**17, decode={"kv_capacity_tokens": 320, "max_running": 2})
    blocks = 2**17 // cluster.decode.engine.schema.block_bytes
    assert blocks < 40, "a few prompts fill the store"
    prompts = [prompt(80, index) for index in range(10)]
    async with asyncio.timeout(100.0):
        answers = await asyncio.gather(*(cluster.run(tokens, max_tokens=10) for tokens in prompts))
    assert [answer.token_ids for answer in answers] == [greedy(tokens, 10) for tokens in prompts]
    await cluster.at_rest()


async def test_load_tells_of_prompts_and_of_context_apart(make_cluster: Any, members: Any) -> None:
    cluster = await make_cluster(both=1, prefill={"max_tokens_per_step": 8})
    await cluster.decode.life.joined.wait()
    assert members.infos["both-0"].role == control_pb2.ROLE_BOTH
    assert members.infos["both-0"].step_limits.max_tokens == 8, "as its steps are configured"
    assert set(members.infos["both-0"].roles) == {control_pb2.ROLE_PREFILL, control_pb2.ROLE_DECODE, control_pb2.ROLE_BOTH}
    stuck = threading.Event()
    cluster.decode.engine.forward = lambda *_, **__: stuck.wait(60)  # nothing is computed until the test has looked
    calls = [cluster.start_prefill(cluster.sequence(prompt(100))), cluster.start_decode(cluster.sequence(prompt(30)), local=True)]
    await until(lambda: cluster.decode.load().num_running == 2)
    load = cluster.decode.load()
    assert (load.num_outstanding_tokens, load.num_prefill_tokens) == (30, 130)
    assert load.kv_usage_ratio == (13 + 4) / cluster.decode.worker.facts.num_pages, "one pool of pages"
    for call in calls:
        call.cancel()
    stuck.set()


async def test_both_halves_export_under_their_own_label(make_cluster: Any) -> None:
    cluster = await make_cluster(both=1)
    await cluster.run(prompt(30), max_tokens=5)
    sample = cluster.decode.metrics.registry.get_sample_value
    assert sample("halfmoon_step_tokens_total", {"role": "prefill"}) == 30
    assert sample("halfmoon_step_tokens_total", {"role": "decode"}) == 4
    alone = await make_cluster()
    await alone.decode.life.joined.wait()
    page = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://{alone.members.infos['decode-0'].metrics_address}/metrics").read().decode()
    )
    assert 'role="decode"' in page and 'role="prefill"' not in page, "a worker exports the halves of its role"


async def test_a_real_worker_takes_on_every_role_and_what_runs_ends_where_it_is(proxy: Any, make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    await asyncio.gather(cluster.prefill.life.joined.wait(), cluster.decode.life.joined.wait())
    gate = threading.Event()
    steps = forwards(cluster.decode.engine, gate=gate)
    decoding = asyncio.create_task(cluster.run(prompt(20), max_tokens=100))
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    for role in ("prefill", "both", "decode", "prefill"):
        await proxy.cluster.set_role(proxy.cluster.members["decode-0"], role, 60.0)
        assert cluster.decode.worker.role == proxy.cluster.members["decode-0"].role == role
    assert steps == [], "its second token is still to come"
    gate.set()
    assert (await decoding).token_ids == greedy(prompt(20), 100)
    await proxy.cluster.set_role(proxy.cluster.members["prefill-0"], "decode", 60.0)
    cluster.prefill_stub, cluster.decode_stub = cluster.stub_pair(cluster.workers[1], cluster.workers[0])
    assert (await cluster.run(prompt(70, 1), max_tokens=20)).token_ids == greedy(prompt(70, 1), 20), "the two have changed places"
    assert cluster.workers[1].prefill.scheduler.num_reserved_pages == 0
    assert cluster.decode.metrics.registry.get_sample_value("halfmoon_step_tokens_total", {"role": "prefill"}) == 70
    await cluster.at_rest()


@pytest.mark.parametrize(
    ("target_s", "tpot_slo_s", "most", "expected"),
    [(0.0, 0.0, 24, 24), (1e-6, 0.0, 2048, 64), (100.0, 1e-6, 2048, 64), (100.0, 0.0, 2048, 190), (0.0, 100.0, 2048, 190)],
    ids=["constant", "the worker's target, tight", "the request's own, tight", "the worker's target, wide", "the request's own, wide"],
)
async def test_tokens_are_the_same_whatever_the_chunks_that_the_tightest_pace_leaves_room_for(
    make_cluster: Any, greedy: Greedy, target_s: float, tpot_slo_s: float, most: int, expected: int
) -> None:
    """64 tokens are computed in any case; the prompts of 190 and 100 fit into a step as a whole where nobody is in a hurry."""
    cluster = await make_cluster(
        both=1, prefill={"max_tokens_per_step": 256}, decode={"tpot_target_s": target_s, "max_prefill_tokens_per_step": most}
    )
    gate = threading.Event()
    gate.set()
    steps = forwards(cluster.decode.engine, 0.0, gate)
    decoding = asyncio.create_task(cluster.run(prompt(20), max_tokens=100, tpot_slo_s=tpot_slo_s))  # r1
    await until(lambda: cluster.decode.scheduler.num_running == 1)
    gate.clear()
    others = [asyncio.create_task(cluster.run_local(prompt(190, 1), max_tokens=6))]  # r2
    await until(lambda: cluster.decode.scheduler.num_running == 2)
    others.append(asyncio.create_task(cluster.run(prompt(100, 2), max_tokens=6)))  # r3
    await until(lambda: cluster.decode.worker.prefill.scheduler.waiting_chunks)
    gate.set()
    answers = await asyncio.gather(*others)
    assert [answer.token_ids for answer in answers] == [greedy(prompt(190, 1), 6), greedy(prompt(100, 2), 6)]
    assert (await decoding).token_ids == greedy(prompt(20), 100)
    chunks = [size for step in steps for name, _, size in step if name == "r2" and size > 1]
    assert chunks[0] == expected and sum(chunks) == 190
    await cluster.at_rest()
