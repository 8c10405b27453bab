"""A real cluster whose prefill worker is two processes: it hands off to a worker of one, and starts again when a rank dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.v1 import control_pb2

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 16


@pytest_asyncio.fixture(scope="module")
async def cluster(ray_nodes: list[RayNode], model_folder: Path, cluster_type: type) -> AsyncIterator[Any]:
    config = ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
        prefill=PrefillConfig(num_workers=1, max_tokens_per_step=128, tensor_parallel=2),
        decode=DecodeConfig(num_workers=1),
    )
    async with running_cluster(config, ray_nodes) as supervisor, cluster_type.open(supervisor) as opened:
        yield opened


def rank_pids(worker_pid: int) -> list[int]:
    """The processes that a worker has started."""
    tasks = Path(f"/proc/{worker_pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


async def ask(cluster: Any, reference: Any, prompt: tuple[int, ...]) -> str:
    """Who computed the prompt. The answer is transformers'."""
    result = await cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
    return result.phases.prefill_worker


async def test_its_hand_offs_are_right_and_a_rank_that_dies_costs_no_request(cluster, reference, prompt_of) -> None:
    assert [await ask(cluster, reference, prompt_of(length)) for length in (1, 64, 300)] == ["prefill-0"] * 3
    (info,) = await cluster.members(control_pb2.ROLE_PREFILL)
    (rank,) = rank_pids(info.pid)
    os.kill(rank, signal.SIGKILL)
    await asyncio.gather(*(ask(cluster, reference, prompt_of(200, seed=seed)) for seed in range(3)))
    async with asyncio.timeout(300):
        while not [one for one in await cluster.members(control_pb2.ROLE_PREFILL) if one.pid != info.pid]:
            await asyncio.sleep(0.1)
    assert await ask(cluster, reference, prompt_of(250, seed=9)) == "prefill-0"
    await cluster.at_rest()
