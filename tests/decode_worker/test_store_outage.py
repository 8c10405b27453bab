"""A store that dies under a real router and real workers: streams go on, prompts are computed without it, and it is used again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.proxy.request import Finished, ProxyRequest, RequestState
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]
NUM_TOKENS = 40
DAYS_S = 7 * 24 * 3600.0


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + 7 * i + i * i) % 157 + 3 for i in range(num_tokens)]


class Outage:
    """The cluster's own store dies and comes back, and the proxy knows of each."""

    def __init__(self, cluster: Any, proxy: Any) -> None:
        self.cluster, self.proxy = cluster, proxy
        self._num_requests = 0

    async def begin(self) -> None:
        await self.cluster.store.stop(0.0)
        store = self.proxy.cluster.store_at(self.cluster.store.address)
        self.proxy.cluster.leave(store, store.stream)

    async def end(self) -> None:
        await self.cluster.new_store()
        self.proxy.know_store(self.cluster.store)

    def open(self, token_ids: list[int]) -> Any:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return self.proxy.router.open(ProxyRequest(f"request-{self._num_requests}", token_ids, sampling, DAYS_S))


async def read(stream: Any) -> tuple[list[int], Finished]:
    events = [event async for event in stream]
    return [token for event in events[:-1] for token in event.token_ids], events[-1]


@pytest.fixture
async def make_outage(proxy: Any, make_cluster: Any) -> Any:
    async def make() -> Outage:
        cluster = await make_cluster(prefill={"max_tokens_per_step": 8}, prefix_cache_hbm=False)
        proxy.know_store(cluster.store)
        await asyncio.gather(cluster.prefill.life.joined.wait(), cluster.decode.life.joined.wait())
        return Outage(cluster, proxy)

    return make


@pytest.mark.parametrize("phase", ["before", "prefill", "handoff", "decode"])
async def test_a_store_that_dies_costs_no_request_a_token_and_is_used_again(make_outage: Any, greedy: Greedy, phase: str) -> None:
    outage = await make_outage()
    cluster, slow = outage.cluster, {"prefill": outage.cluster.prefill, "decode": outage.cluster.decode}
    if phase in slow:
        slow[phase].slow(0.02)
    if phase == "before":
        await outage.begin()
    stream = outage.open(prompt(90))
    reading = asyncio.create_task(read(stream))
    if phase == "prefill":
        await until(lambda: cluster.store.stats().num_bytes_pushed > 0)
        await outage.begin()
    elif phase == "handoff":
        await until(lambda: stream.state is RequestState.HANDOFF or stream.state is RequestState.DECODE)
        await outage.begin()
    elif phase == "decode":
        await until(lambda: stream.state is RequestState.DECODE)
        await outage.begin()
    token_ids, finished = await reading
    assert token_ids == greedy(prompt(90), NUM_TOKENS)
    if phase in ("before", "prefill"):
        assert finished.phases.transport == "local" and finished.phases.num_attempts <= 3
    if phase == "decode":
        assert finished.phases.num_attempts == 1
    during, finished = await read(outage.open(prompt(50, 1)))
    assert during == greedy(prompt(50, 1), NUM_TOKENS) and finished.phases.transport == "local"
    assert finished.usage.num_cached_tokens == 0
    await until(lambda: cluster.decode.scheduler.at_rest and cluster.prefill.scheduler.at_rest)
    await outage.end()
    for num_cached in (0, 48):
        after, finished = await read(outage.open(prompt(50, 1)))
        assert after == greedy(prompt(50, 1), NUM_TOKENS)
        assert (finished.phases.prefill_worker, finished.usage.num_cached_tokens) == ("prefill-0", num_cached)
    await cluster.at_rest()


async def test_requests_through_the_whole_outage_are_all_answered_right(make_outage: Any, greedy: Greedy) -> None:
    outage = await make_outage()
    asked = [prompt(20 + 9 * number, number) for number in range(5)]
    first = [asyncio.create_task(read(outage.open(token_ids))) for token_ids in asked]
    await until(lambda: outage.cluster.store.stats().num_bytes_pushed > 0)
    await outage.begin()
    second = [asyncio.create_task(read(outage.open(token_ids))) for token_ids in asked]
    await outage.end()
    third = [asyncio.create_task(read(outage.open(token_ids))) for token_ids in asked]
    for task, token_ids in zip([*first, *second, *third], 3 * asked, strict=True):
        assert (await task)[0] == greedy(token_ids, NUM_TOKENS)
    await outage.cluster.at_rest()


async def test_the_other_node_s_store_takes_the_hand_offs(make_outage: Any, greedy: Greedy, elsewhere: StoreServer) -> None:
    outage = await make_outage()
    outage.proxy.know_store(elsewhere)
    await outage.begin()
    for _ in range(2):
        token_ids, finished = await read(outage.open(prompt(90)))
        assert token_ids == greedy(prompt(90), NUM_TOKENS)
        assert (finished.phases.prefill_worker, finished.phases.transport) == ("prefill-0", "tcp")
    outage.cluster.store = elsewhere
    await outage.cluster.at_rest()
