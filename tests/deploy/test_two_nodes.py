"""Two Ray nodes on one machine: prefill on the one, decode on the other, KV over TCP between two stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 64
NUM_TOKENS_EACH_OF_MANY = 24


@pytest_asyncio.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["1P1D", "2P2D"])
async def cluster(
    request: pytest.FixtureRequest, two_nodes: list[RayNode], model_folder: Path, cluster_type: type
) -> AsyncIterator[object]:
    num_prefill, num_decode = request.param
    config = ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
        prefill=PrefillConfig(num_workers=num_prefill, max_tokens_per_step=512),
        decode=DecodeConfig(num_workers=num_decode),
    )
    async with running_cluster(config, two_nodes) as supervisor, cluster_type.open(supervisor) as opened:
        yield opened


async def test_tokens_over_tcp_equal_those_of_transformers(cluster, reference, prompt_of) -> None:
    transports = set()
    for prompt_len in (1, 64, 65, 700, 1500):
        prompt = prompt_of(prompt_len)
        result = await cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
        transports.add(result.phases.transport)
    assert "tcp" in transports
    await cluster.at_rest()


async def test_32_concurrent_streams_over_tcp_give_the_same_tokens(cluster, reference, prompt_of) -> None:
    prompts = [prompt_of(20 + 17 * i, seed=1) for i in range(32)]
    answers = await asyncio.gather(*(cluster.greedy(prompt, NUM_TOKENS_EACH_OF_MANY) for prompt in prompts))
    assert answers == [reference.generate(prompt, NUM_TOKENS_EACH_OF_MANY, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    await cluster.at_rest()


async def test_the_second_turn_finds_its_prefix_across_nodes(cluster, reference, prompt_of) -> None:
    first = prompt_of(200, seed=2)
    answer = await cluster.greedy(first, NUM_TOKENS)
    await cluster.at_rest()  # the answer's end does not wait long for its blocks to be cached
    second = (*first, *answer, *prompt_of(30, seed=3))
    result = await cluster.client.generate(token_ids=list(second), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(second, NUM_TOKENS, result.token_ids)
    assert result.usage.num_cached_tokens >= 128
