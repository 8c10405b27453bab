"""A client that goes away, through a real router to real workers and a real store. Nothing here ends by its deadline, which is days off."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from halfmoon.protocol.sampling import SamplingParams
from halfmoon.proxy.request import ProxyRequest, RequestState

NUM_PROMPT_TOKENS, NUM_TOKENS = 200, 50
STEPS = {"prefill": NUM_PROMPT_TOKENS // 8, "decode": NUM_TOKENS - 1}
DAYS_S = 7 * 24 * 3600.0


@pytest.mark.parametrize("phase", STEPS)
async def test_a_client_that_goes_away_frees_prefill_store_and_decode_by_a_message(proxy: Any, make_cluster: Any, phase: str) -> None:
    cluster = await make_cluster(prefill={"max_tokens_per_step": 8})
    proxy.know_store(cluster.store)
    await asyncio.gather(cluster.prefill.life.joined.wait(), cluster.decode.life.joined.wait())
    steps = getattr(cluster, phase).slow(0.05)
    prompt = random.Random(phase).choices(range(3, 160), k=NUM_PROMPT_TOKENS)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    stream = proxy.router.open(ProxyRequest("goes", prompt, sampling, DAYS_S))
    if phase == "decode":
        await anext(stream)
    async with asyncio.timeout(60.0):
        while not steps or not cluster.held():
            await asyncio.sleep(0.005)
    await stream.cancel("the client went away")
    assert stream.state is RequestState.ABORTED
    num_steps = len(steps)
    await cluster.at_rest()
    assert len(steps) - num_steps < STEPS[phase] // 2, "it is freed while most of its steps are still to come"
    assert (proxy.router.num_queued, proxy.router.num_running) == (0, 0)
