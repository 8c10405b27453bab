"""Log probabilities of prompts, handed off and computed where they are answered, against transformers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from halfmoon.protocol.errors import NonFiniteLogits
from halfmoon.protocol.v1 import common_pb2, worker_pb2

Greedy = Callable[[list[int], int], list[int]]
WAYS = ["handed off", "local"]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


async def scored(cluster: Any, way: str, token_ids: list[int], num_top: int, **sampling: Any) -> tuple[Any, list[Any]]:
    """The answer and the messages with its prompt's log probabilities, all of which came before it."""
    sequence = cluster.sequence(token_ids, num_prompt_logprobs=num_top, **{"max_tokens": 3, **sampling})
    decode, answer, parts = cluster.start_decode(sequence, local=way == "local"), cluster.answer(), list[Any]()
    if way == "handed off":
        handoff = common_pb2.HandoffId(id=sequence.request_id, epoch=1)
        request = worker_pb2.PrefillRequest(sequence=sequence, handoff=handoff, store_address=cluster.store.address)
        async for reply in cluster.prefill_stub.PrefillWithLogprobs(request):
            assert not answer.state, "nothing follows the state"
            if reply.HasField("prompt_logprobs"):
                parts.append(reply.prompt_logprobs)
            else:
                answer.state = reply.state
        assert answer.state is not None
    async for reply in decode:
        if reply.HasField("prompt_logprobs"):
            assert way == "local" and answer.admitted is None
            parts.append(reply.prompt_logprobs)
        elif reply.HasField("admitted"):
            answer.admitted = reply.admitted
        elif reply.HasField("tokens"):
            answer.token_ids += [token.token_id for token in reply.tokens.tokens]
        else:
            answer.finished = reply.finished
    return answer, parts


def check(model: LlamaForCausalLM, token_ids: list[int], num_top: int, parts: list[Any]) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(dim=-1)
    position = 1
    for part in parts:
        assert part.start == position
        rows = expected[position - 1 : position - 1 + len(part.logprobs)]
        position += len(part.logprobs)
        chosen = rows.gather(1, torch.tensor(token_ids[part.start : position]).unsqueeze(1))
        np.testing.assert_allclose(part.logprobs, chosen.squeeze(1), atol=1e-3)
        assert list(part.ranks) == ((rows > chosen).sum(dim=1) + 1).tolist()
        top = rows.topk(num_top, dim=1)
        assert list(part.top_token_ids) == top.indices.ravel().tolist()
        np.testing.assert_allclose(part.top_logprobs, top.values.ravel(), atol=1e-3)
    assert position == max(len(token_ids), 1)


@pytest.mark.parametrize("way", WAYS)
async def test_prompts_of_any_length_are_scored_beside_others_that_are_not(
    make_cluster: Any, model: tuple[Path, LlamaForCausalLM], greedy: Greedy, way: str
) -> None:
    cluster = await make_cluster(decode={"max_prefill_tokens_per_step": 40})
    lengths, plain = [1, 2, 8, 47, 150, 200], [prompt(length, 9) for length in (5, 70)]
    run = cluster.run_local if way == "local" else cluster.run
    *found, first, second = await asyncio.gather(
        *(scored(cluster, way, prompt(length), number) for number, length in enumerate(lengths)),
        *(run(tokens, max_tokens=10) for tokens in plain),
    )
    for number, (length, (answer, parts)) in enumerate(zip(lengths, found, strict=True)):
        assert answer.token_ids == greedy(prompt(length), 3)
        check(model[1], prompt(length), number, parts)
    assert [first.token_ids, second.token_ids] == [greedy(tokens, 10) for tokens in plain]
    await cluster.every_page_is_free()


@pytest.mark.parametrize("way", WAYS)
async def test_a_cached_prefix_is_computed_again_and_what_is_computed_is_cached(
    make_cluster: Any, model: tuple[Path, LlamaForCausalLM], greedy: Greedy, way: str
) -> None:
    cluster = await make_cluster()
    run, text = cluster.run_local if way == "local" else cluster.run, prompt(90)
    await run(text, max_tokens=2)
    answer, parts = await scored(cluster, way, text, 2)
    check(model[1], text, 2, parts)
    assert answer.admitted.state.num_cached_tokens == 0 and answer.token_ids == greedy(text, 3)
    other = prompt(90, 1)
    _, parts = await scored(cluster, way, other, 0)
    check(model[1], other, 0, parts)
    assert (await run(other, max_tokens=2)).admitted.state.num_cached_tokens > 80


async def test_a_prompt_that_loses_its_pages_half_way_is_scored_once(make_cluster: Any, model: tuple[Path, LlamaForCausalLM]) -> None:
    few = await make_cluster(decode={"kv_capacity_tokens": 96, "max_prefill_tokens_per_step": 1})
    first = few.start_decode(few.sequence(prompt(20), max_tokens=70), local=True)
    async for reply in first:
        if reply.HasField("admitted"):
            break
    reading = asyncio.ensure_future(few.read(first, few.answer()))
    answer, parts = await scored(few, "local", prompt(60), 3)
    check(model[1], prompt(60), 3, parts)
    assert answer.finished.phases.num_preemptions > 0
    await reading


@pytest.mark.parametrize("way", WAYS)
async def test_a_prompt_whose_logits_are_no_numbers_is_refused_alone(make_cluster: Any, greedy: Greedy, way: str) -> None:
    cluster = await make_cluster()
    worker = cluster.workers[1 if way == "local" else 0]
    decoder = worker.executor.engine._decoder
    head = decoder.head

    def broken(*rows: torch.Tensor) -> torch.Tensor:
        logits = head(*rows)
        if len(logits) > 1:  # of a prompt, and not of what is sampled
            logits[3, 0] = torch.inf
        return logits

    decoder.head = broken
    sequence = cluster.sequence(prompt(30), num_prompt_logprobs=1, max_tokens=3)
    if way == "local":
        error = await cluster.error_of(cluster.start_decode(sequence, local=True))
    else:
        handoff = common_pb2.HandoffId(id=sequence.request_id, epoch=1)
        request = worker_pb2.PrefillRequest(sequence=sequence, handoff=handoff, store_address=cluster.store.address)
        error = await cluster.error_of(cluster.prefill_stub.PrefillWithLogprobs(request))
    assert isinstance(error, NonFiniteLogits) and "prompt" in error.message
    run = cluster.run_local if way == "local" else cluster.run
    assert (await run(prompt(30), max_tokens=3)).token_ids == greedy(prompt(30), 3)
    await cluster.every_page_is_free()
