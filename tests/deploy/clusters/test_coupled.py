"""Local prefill on a real cluster without prefill workers, which is then given one and loses it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.v1 import control_pb2

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 32


def config(model_folder: Path, num_prefill: int) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
        prefill=PrefillConfig(num_workers=num_prefill, max_tokens_per_step=128),
        decode=DecodeConfig(num_workers=1, max_prefill_tokens_per_step=128),
    )


@pytest_asyncio.fixture(scope="module")
async def coupled(ray_nodes: list[RayNode], model_folder: Path, cluster_type: type) -> AsyncIterator[object]:
    async with running_cluster(config(model_folder, 0), ray_nodes) as supervisor, cluster_type.open(supervisor) as opened:
        yield opened


async def test_a_cluster_without_prefill_workers_is_ready_and_answers_as_transformers_do(coupled, reference, prompt_of) -> None:
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://{coupled.supervisor.http_address}/ready")).json() == {"ready": True, "missing": []}
    for prompt_len in (1, 64, 300):
        prompt = prompt_of(prompt_len)
        answer = await coupled.greedy(prompt, NUM_TOKENS)
        assert answer == reference.generate(prompt, NUM_TOKENS, answer)
    await coupled.at_rest()


async def test_eight_at_once_each_get_their_own_tokens(coupled, reference, prompt_of) -> None:
    prompts = [prompt_of(20 + 70 * i, seed=1) for i in range(8)]
    answers = await asyncio.gather(*(coupled.greedy(prompt, NUM_TOKENS) for prompt in prompts))
    assert answers == [reference.generate(prompt, NUM_TOKENS, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    await coupled.at_rest()


async def test_the_second_turn_reports_its_cached_tokens(coupled, reference, prompt_of) -> None:
    first = prompt_of(200, seed=2)
    answer = await coupled.greedy(first, NUM_TOKENS)
    await coupled.at_rest()  # the answer's end does not wait long for its blocks to be cached
    second = (*first, *answer, *prompt_of(30, seed=3))
    result = await coupled.client.generate(token_ids=list(second), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(second, NUM_TOKENS, result.token_ids)
    # the answer's last token has no KV: it was sampled and never fed back
    assert result.usage.num_cached_tokens == len(first) + NUM_TOKENS - 1, "found in the worker's pages, inside a block"
    phases = result.phases
    assert (phases.transport, phases.prefill_worker, phases.decode_worker) == ("local", "decode-0", "decode-0")
    assert phases.num_attempts == 1


async def test_the_only_prefill_worker_killed_in_mid_prefill_is_made_up_for_by_decode(coupled, model_folder, reference, prompt_of) -> None:
    assert await coupled.supervisor.apply(config(model_folder, 1)) == "prefill-0 added"
    (prefill,) = await coupled.members(control_pb2.ROLE_PREFILL)
    prompt = prompt_of(3500, seed=4)
    task = asyncio.create_task(coupled.client.generate(token_ids=list(prompt), max_tokens=16, temperature=0.0, ignore_eos=True))
    async with asyncio.timeout(60):
        while not any(found.num_handoffs for found in await coupled.store_stats()):
            await asyncio.sleep(0.002)
    os.kill(prefill.pid, signal.SIGKILL)  # its prompt takes 28 steps: no call may come between
    result = await task
    assert list(result.token_ids) == reference.generate(prompt, 16, result.token_ids)
    assert (result.phases.num_attempts, result.phases.transport, result.phases.prefill_worker) == (2, "local", "decode-0")
    await coupled.all_joined(3)
    await coupled.at_rest()
    seeds, computed_by = itertools.count(5), ""
    async with asyncio.timeout(60):  # it is back, and gets its work back as soon as it has told how it stands
        while computed_by != "prefill-0":
            token_ids = list(prompt_of(300, seed=next(seeds)))
            again = await coupled.client.generate(token_ids=token_ids, max_tokens=4, temperature=0.0, ignore_eos=True)
            computed_by = again.phases.prefill_worker
