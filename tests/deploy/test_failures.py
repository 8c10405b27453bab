"""What dies, and what it costs: a replay, a clear error, never a hang and never a leak."""

from __future__ import annotations

import asyncio
import time

import pytest

from halfmoon.client import Delta
from halfmoon.protocol.errors import Unavailable
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_MEMBERS = 5  # store, 2 prefill, 2 decode


async def handoff_begun(cluster) -> None:
    async with asyncio.timeout(60):
        while not any(found.num_handoffs for found in await cluster.store_stats()):
            await asyncio.sleep(0.002)


async def holder(cluster, role: int) -> str:
    """The worker of a role that the one request is on, once it has reported so."""
    async with asyncio.timeout(60):
        while True:
            for member in (await cluster.status()).members:
                if member.info.role == role and (member.load.num_running or member.load.num_waiting):
                    return member.info.id
            await asyncio.sleep(0.02)


async def test_a_client_that_leaves_while_decoding_frees_everything_long_before_its_answer_would_end(cluster, prompt_of) -> None:
    stream = cluster.client.stream(token_ids=list(prompt_of(500)), max_tokens=2000, temperature=0.0, ignore_eos=True)
    arrivals: list[float] = []
    async for event in stream:
        if isinstance(event, Delta):
            arrivals.append(time.monotonic())
        if len(arrivals) == 50:
            break
    stream.close()
    pace_s = (arrivals[-1] - arrivals[0]) / 49
    await cluster.at_rest(within_s=1.0 + 1000 * pace_s)  # 1,950 tokens are left


async def test_a_client_that_leaves_while_prefilling_frees_everything_before_its_prompt_is_computed(cluster, prompt_of) -> None:
    (before,) = await cluster.store_stats()
    task = asyncio.create_task(cluster.greedy(prompt_of(3900), 4))
    await handoff_begun(cluster)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await cluster.at_rest()
    (after,) = await cluster.store_stats()
    block_bytes = KVSchema.from_proto((await cluster.members(control_pb2.ROLE_DECODE))[0].schema).block_bytes
    assert after.num_bytes_pushed - before.num_bytes_pushed < 3900 // 64 * block_bytes


async def test_a_prefill_worker_killed_while_it_pushes_costs_a_replay_and_no_error(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(3500, seed=1)
    task = asyncio.create_task(cluster.client.generate(token_ids=list(prompt), max_tokens=16, temperature=0.0, ignore_eos=True))
    await handoff_begun(cluster)
    await cluster.kill(await holder(cluster, control_pb2.ROLE_PREFILL))
    result = await task
    assert list(result.token_ids) == reference.generate(prompt, 16, result.token_ids)
    assert result.phases.num_attempts == 2
    await cluster.all_joined(NUM_MEMBERS)
    await cluster.at_rest()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 11}], ids=["greedy", "seeded"])
async def test_a_decode_worker_killed_mid_stream_repeats_and_loses_no_token(cluster, prompt_of, sampling: dict[str, float]) -> None:
    options = {"token_ids": list(prompt_of(200, seed=2)), "max_tokens": 600, "ignore_eos": True, **sampling}
    undisturbed = await cluster.client.generate(**options)
    await cluster.at_rest()
    token_ids: list[int] = []
    stream = cluster.client.stream(**options)
    async for event in stream:
        before, token_ids = len(token_ids), [*token_ids, *(event.token_ids if isinstance(event, Delta) else ())]
        if before < 50 <= len(token_ids):
            await cluster.kill(await holder(cluster, control_pb2.ROLE_DECODE))
    assert token_ids == list(undisturbed.token_ids)
    assert (await stream.completion()).phases.num_attempts == 2
    await cluster.all_joined(NUM_MEMBERS)
    await cluster.at_rest()


async def test_a_stream_without_any_decode_worker_waits_for_one_and_goes_on(cluster, reference, prompt_of) -> None:
    await cluster.kill("decode-0")
    prompt, token_ids = prompt_of(200, seed=3), []
    async for event in cluster.client.stream(token_ids=list(prompt), max_tokens=300, temperature=0.0, ignore_eos=True):
        if isinstance(event, Delta):
            if not token_ids:
                await cluster.kill("decode-1")
            token_ids += event.token_ids
    assert token_ids == reference.generate(prompt, 300, token_ids)
    await cluster.all_joined(NUM_MEMBERS)
    await cluster.at_rest()


async def test_a_killed_store_costs_no_request_its_answer_and_takes_hand_offs_again(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(3000, seed=4)
    task = asyncio.create_task(cluster.greedy(prompt, 8))
    await handoff_begun(cluster)
    await cluster.kill("store-0")
    answers = [await task, await cluster.greedy(prompt, 8)]
    assert answers == [reference.generate(prompt, 8, answer) for answer in answers]
    await cluster.all_joined(NUM_MEMBERS)
    result = await cluster.client.generate(token_ids=list(prompt), max_tokens=8, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == answers[0] and result.phases.transport == "shm"
    await cluster.at_rest()


async def test_sequences_that_already_decode_outlive_the_store(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(100, seed=5)
    token_ids: list[int] = []
    async for event in cluster.client.stream(token_ids=list(prompt), max_tokens=200, temperature=0.0, ignore_eos=True):
        if isinstance(event, Delta):
            if not token_ids:
                await cluster.kill("store-0")
            token_ids += event.token_ids
    assert token_ids == reference.generate(prompt, 200, token_ids)
    await cluster.all_joined(NUM_MEMBERS)


async def test_a_killed_proxy_comes_back_on_its_ports_and_members_rejoin(cluster, reference, prompt_of) -> None:
    import ray

    prompt = prompt_of(80, seed=6)
    address = cluster.supervisor.grpc_address
    ray.kill(next(member.actor for member in cluster.supervisor.members if member.id == "proxy"), no_restart=True)
    async with asyncio.timeout(300):
        while True:
            try:
                await cluster.all_joined(NUM_MEMBERS)
                break
            except OSError:
                raise
            except Exception as error:
                if "UNAVAILABLE" not in str(error):
                    raise
                await asyncio.sleep(0.1)
    assert cluster.supervisor.grpc_address == address
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await cluster.greedy(prompt, 8)
                assert answer == reference.generate(prompt, 8, answer)
                break
            except Unavailable:
                await asyncio.sleep(0.1)
