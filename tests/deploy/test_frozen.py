"""Processes that are stopped (SIGSTOP) and not dead: their sockets stay open. Requests go on elsewhere, and what goes on rejoins."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from halfmoon.client import Delta
from halfmoon.protocol.v1 import control_pb2

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

NUM_MEMBERS = 5  # store, 2 prefill, 2 decode
NOTICED_S = 3.0
SLACK_S = 9.0  # what a machine with twenty busy processes may add; nothing but the silence is there to be noticed


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def pid_of(cluster, member_id: str) -> int:
    return next(member.info.pid for member in (await cluster.status()).members if member.info.id == member_id)


async def holder(cluster, role: int) -> str:
    """The worker of a role that the one request is on, once it has reported so."""
    async with asyncio.timeout(60):
        while True:
            for member in (await cluster.status()).members:
                if member.info.role == role and (member.load.num_running or member.load.num_waiting):
                    return member.info.id
            await asyncio.sleep(0.02)


async def left(cluster, member_id: str) -> float:
    """Seconds until the proxy has left it."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        while any(member.info.id == member_id for member in (await cluster.status()).members):
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_stream_goes_on_elsewhere_when_its_decode_worker_is_stopped(cluster, prompt_of) -> None:
    options = {"token_ids": list(prompt_of(200, seed=2)), "max_tokens": 600, "ignore_eos": True, "temperature": 0.0}
    undisturbed = await cluster.client.generate(**options)
    token_ids: list[int] = []
    stream = cluster.client.stream(**options)
    async for event in stream:
        token_ids += event.token_ids if isinstance(event, Delta) else ()
        if len(token_ids) >= 30:
            break
    frozen = await holder(cluster, control_pb2.ROLE_DECODE)
    with stopped(await pid_of(cluster, frozen)):
        assert await left(cluster, frozen) < NOTICED_S + SLACK_S
        async for event in stream:
            token_ids += event.token_ids if isinstance(event, Delta) else ()
        assert token_ids == list(undisturbed.token_ids)
        assert (await stream.completion()).phases.num_attempts == 2
    await cluster.all_joined(NUM_MEMBERS, timeout_s=60)
    await cluster.at_rest()


async def test_a_prompt_is_computed_elsewhere_when_its_prefill_worker_is_stopped(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(3500, seed=1)
    task = asyncio.create_task(cluster.client.generate(token_ids=list(prompt), max_tokens=8, temperature=0.0, ignore_eos=True))
    frozen = await holder(cluster, control_pb2.ROLE_PREFILL)
    with stopped(await pid_of(cluster, frozen)):
        assert await left(cluster, frozen) < NOTICED_S + SLACK_S
        result = await task
    assert list(result.token_ids) == reference.generate(prompt, 8, result.token_ids)
    assert result.phases.num_attempts == 2
    await cluster.all_joined(NUM_MEMBERS, timeout_s=60)
    await cluster.at_rest()


async def test_a_stopped_store_is_left_and_comes_back_and_streams_that_decode_do_not_notice(cluster, reference, prompt_of) -> None:
    prompt = prompt_of(100, seed=5)
    stream = cluster.client.stream(token_ids=list(prompt), max_tokens=300, temperature=0.0, ignore_eos=True)
    token_ids: list[int] = []
    async for event in stream:
        token_ids += event.token_ids if isinstance(event, Delta) else ()
        if token_ids:
            break
    with stopped(await pid_of(cluster, "store-0")):
        assert await left(cluster, "store-0") < NOTICED_S + SLACK_S
        async for event in stream:
            token_ids += event.token_ids if isinstance(event, Delta) else ()
        assert token_ids == reference.generate(prompt, 300, token_ids)
    await cluster.all_joined(NUM_MEMBERS, timeout_s=60)
    await cluster.at_rest()
