"""A real cluster of two workers of both roles: with hand-offs between them, then coupled behind another proxy."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from halfmoon.client import Delta
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import BothConfig, ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.v1 import control_pb2

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 32


def config(model_folder: Path, **proxy: Any) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, **proxy),
        prefill=PrefillConfig(num_workers=0, max_tokens_per_step=256),
        decode=DecodeConfig(num_workers=0, max_prefill_tokens_per_step=128),
        both=BothConfig(num_workers=2),
    )


@pytest_asyncio.fixture(scope="module")
async def cluster(ray_nodes: list[RayNode], model_folder: Path, cluster_type: type) -> AsyncIterator[Any]:
    """Placed at random, so that every pair of the two comes."""
    async with running_cluster(config(model_folder, policy="random"), ray_nodes) as supervisor, cluster_type.open(supervisor) as opened:
        yield opened


async def test_each_of_the_two_hands_off_to_the_other_and_answers_as_transformers_do(cluster, reference, prompt_of) -> None:
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://{cluster.supervisor.http_address}/ready")).json() == {"ready": True, "missing": []}
    assert [info.id for info in await cluster.members(control_pb2.ROLE_BOTH)] == ["both-0", "both-1"]
    transports: dict[tuple[str, str], set[str]] = {}
    for number in range(40):
        prompt = prompt_of((1, 64, 65, 300)[number % 4], seed=number)
        result = await cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
        transports.setdefault((result.phases.prefill_worker, result.phases.decode_worker), set()).add(result.phases.transport)
        if len(transports) == 4 and number >= 8:
            break
    assert transports == {
        ("both-0", "both-0"): {"local"},
        ("both-0", "both-1"): {"shm"},
        ("both-1", "both-0"): {"shm"},
        ("both-1", "both-1"): {"local"},
    }
    await cluster.at_rest()


async def test_32_at_once_each_get_their_own_tokens(cluster, reference, prompt_of) -> None:
    prompts = [prompt_of(20 + 7 * i, seed=1) for i in range(32)]
    answers = await asyncio.gather(*(cluster.greedy(prompt, 24) for prompt in prompts))
    assert answers == [reference.generate(prompt, 24, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    await cluster.at_rest()


async def test_the_next_turn_finds_the_blocks_of_the_last(cluster, reference, prompt_of) -> None:
    first = prompt_of(200, seed=2)
    before = await cluster.client.generate(token_ids=list(first), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    await cluster.at_rest()  # the answer's end does not wait long for its blocks to be cached
    second = (*first, *before.token_ids, *prompt_of(30, seed=3))
    result = await cluster.client.generate(token_ids=list(second), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(second, NUM_TOKENS, result.token_ids)
    num_computed = len(first) + NUM_TOKENS - 1  # the last token is sampled and not computed
    found = {before.phases.prefill_worker: len(first), before.phases.decode_worker: num_computed}  # in a worker's own pages
    in_store = num_computed // 64 * 64  # whole blocks alone
    assert result.usage.num_cached_tokens == found.get(result.phases.prefill_worker, in_store)


async def test_one_that_dies_costs_a_replay_on_the_other(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(300, seed=4)
    stream = cluster.client.stream(token_ids=list(prompt), max_tokens=300, temperature=0.0, ignore_eos=True)
    token_ids: list[int] = []
    async for event in stream:
        if isinstance(event, Delta):
            if not token_ids:
                await cluster.kill(await cluster.decoding_worker(stream.request_id))
            token_ids += event.token_ids
    assert token_ids == reference.generate(prompt, 300, token_ids)
    assert (await stream.completion()).phases.num_attempts == 2
    await cluster.all_joined(3)


async def test_coupled_the_two_answer_without_a_hand_off(cluster, reference, prompt_of) -> None:
    supervisor, spec = cluster.supervisor, cluster.supervisor.spec
    proxy = dataclasses.replace(spec.config.proxy, local_prefill="always")
    # what a proxy that is started again is started with
    supervisor._spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, proxy=proxy))
    await cluster.restart_proxy(3)
    prompts = [prompt_of(20 + 70 * i, seed=6) for i in range(8)]
    results = await asyncio.gather(
        *(cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True) for prompt in prompts)
    )
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
    assert {result.phases.transport for result in results} == {"local"}
    assert {result.phases.decode_worker for result in results} == {"both-0", "both-1"}
    await cluster.at_rest()
