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


@pytest_asyncio.fixture(scope="module")
async def cluster(two_nodes: list[RayNode], model_folder: Path, cluster_type: type) -> AsyncIterator[object]:
    """Two prefill and two decode workers, taken in turn: prefill-0 with decode-0, prefill-1 with decode-1, each pair on two nodes."""
    config = ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, policy="round_robin"),
        prefill=PrefillConfig(num_workers=2, max_tokens_per_step=512),
        decode=DecodeConfig(num_workers=2),
    )
    async with running_cluster(config, two_nodes) as supervisor, cluster_type.open(supervisor) as opened:
        yield opened


async def test_tokens_over_tcp_equal_those_of_transformers(cluster, reference, prompt_of) -> None:
    pairs = set()
    for prompt_len in (1, 64, 65, 700, 1500):
        prompt = prompt_of(prompt_len)
        result = await cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
        pairs.add((result.phases.prefill_worker, result.phases.decode_worker, result.phases.transport))
    assert pairs == {("prefill-0", "decode-0", "tcp"), ("prefill-1", "decode-1", "tcp")}, "either node to the other"
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
