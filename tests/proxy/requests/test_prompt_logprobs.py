"""A prompt's log probabilities on their way through the router: before the tokens, whole, and once."""

from __future__ import annotations

import asyncio
from typing import Any

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.proxy.request import Tokens

PATIENCE_S = 60.0


def scores(stream: Any) -> list[tuple[int, float]]:
    return [(part.start, part.logprobs[0]) for part in stream.prompt_logprobs]


def expected(request: Any) -> list[tuple[int, float]]:
    return [(index, -float(index)) for index in range(1, len(request.token_ids))]


async def test_no_token_is_given_before_the_prompt_is_scored(bench: Any, peers: Any) -> None:
    gate = asyncio.Event()

    async def hold(index: int) -> None:
        if index == 5:
            await gate.wait()

    bench.prefills[0].before_scored = hold
    request = bench.request(num_prompt_logprobs=0)
    stream = bench.router.open(request)
    await asyncio.wait_for(bench.decodes[0].finished.wait(), PATIENCE_S)
    assert stream.take() == []
    gate.set()
    first = await asyncio.wait_for(anext(stream), PATIENCE_S)
    assert isinstance(first, Tokens) and scores(stream) == expected(request)
    rest, finished = await asyncio.wait_for(peers.read(stream), PATIENCE_S)
    assert first.token_ids + rest == peers.answer(request) and finished.phases.num_attempts == 1
    bench.assert_at_rest()


async def test_a_prefill_worker_that_dies_while_it_scores_costs_a_replay(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1)
    reached = asyncio.Event()

    async def hang(index: int) -> None:
        if index == 4:
            reached.set()
            await asyncio.Event().wait()

    bench.prefills[0].before_scored = hang
    request = bench.request(num_prompt_logprobs=0)
    stream = bench.router.open(request)
    await asyncio.wait_for(reached.wait(), PATIENCE_S)
    await bench.prefills[0].leave()
    token_ids, finished = await asyncio.wait_for(peers.read(stream), PATIENCE_S)
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 2
    assert scores(stream) == expected(request)


async def test_a_replay_behind_the_first_token_scores_nothing_again(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2)

    async def hang(index: int) -> None:
        if index == 3:
            await asyncio.Event().wait()

    for decode in bench.decodes:
        decode.before_token = hang
    request = bench.request(num_prompt_logprobs=2)
    stream = bench.router.open(request)
    given = await asyncio.wait_for(peers.take(stream, 3), PATIENCE_S)
    (hung,) = (decode for decode in bench.decodes if decode.requests)
    for decode in bench.decodes:
        decode.before_token = lambda _: asyncio.sleep(0)
    await hung.leave()
    rest, _ = await asyncio.wait_for(peers.read(stream), PATIENCE_S)
    assert given + rest == peers.answer(request)
    asked = [one.sequence.sampling.HasField("num_prompt_logprobs") for one in bench.prefills[0].requests]
    assert asked == [True, False] and scores(stream) == expected(request)


async def test_a_held_prefix_is_no_reason_to_place_it_anywhere(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(policy="cache_aware")
    schema, prompt = peers.SCHEMA, list(range(20, 40))
    keys = block_keys(root_key(schema.fingerprint), prompt, schema.block_size)
    bench.stores[0].publish(stored=keys)
    async with asyncio.timeout(PATIENCE_S):
        while bench.router._index.leading_runs(keys) != {bench.stores[0].address: len(keys)}:
            await asyncio.sleep(0.005)
    found: list[int] = []
    for sampling in ({}, {"num_prompt_logprobs": 1}):
        stream = bench.router.open(bench.request(prompt, **sampling))
        found.append(stream._runner.decision.attempts[-1].answer.num_cached_tokens)
        await asyncio.wait_for(peers.read(stream), PATIENCE_S)
    assert found[0] >= 16 and found[1] == 0
