"""Roles that change while requests run: real workers under a real router, against transformers' greedy generate."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.learner import Learner

Greedy = Callable[[list[int], int], list[int]]
DAYS_S = 7 * 24 * 3600.0
NUM_WORKERS = 4
MODEL = CostModel(
    per_token_s=2e-5, per_token_prefix_s=2e-6, per_token_squared_s=1e-6, step_s=0.02, per_sequence_s=5e-4, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=100_000, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip
"""A prompt of 200 tokens takes 44 ms alone, and 198 ms in steps of 24 ms that read 20 ms of weights. 8 sequences fill such a step."""
SLO = {"ttft_slo_s": 0.45, "tpot_slo_s": 0.024 / 0.92}
NUM_LONG, NUM_SHORT = 24, 24  # requests in a burst of either kind


def prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(f"roles/{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


class Load:
    """Requests through the router, each compared with its reference once it has ended."""

    def __init__(self, router: Any, greedy: Greedy) -> None:
        self._router, self._greedy = router, greedy
        self.num_opened = self.num_ended = 0

    async def burst(self, num: int, num_prompt_tokens: int, num_tokens: int, num_different: int) -> None:
        """All at once. Returns when the last one has its tokens."""
        first = self.num_ended
        prompts = [prompt(num_prompt_tokens, first + index % num_different) for index in range(num)]
        streams = [self._open(f"r{first + index}", token_ids, num_tokens) for index, token_ids in enumerate(prompts)]
        for token_ids, stream in zip(prompts, streams, strict=True):
            found = [token for event in [event async for event in stream][:-1] for token in event.token_ids]
            assert found == self._greedy(token_ids, num_tokens)
            self.num_ended += 1

    async def any_mix(self, rng: random.Random, num: int) -> None:
        """One after the other, of any lengths; every fourth one's client leaves in the middle."""
        for _ in range(num):
            token_ids, num_tokens = prompt(rng.choice((5, 40, 130, 200)), rng.randrange(4)), rng.randrange(1, 30)
            stream = self._open(f"m{rng.random()}", token_ids, num_tokens)
            if rng.random() < 0.25:
                await anext(stream)
                await stream.cancel("the client left")
                continue
            found = [token for event in [event async for event in stream][:-1] for token in event.token_ids]
            assert found == self._greedy(token_ids, 30)[:num_tokens]
            self.num_ended += 1

    def _open(self, request_id: str, token_ids: list[int], num_tokens: int) -> Any:
        self.num_opened += 1
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return self._router.open(ProxyRequest(request_id, token_ids, sampling, DAYS_S))


async def joined(proxy: Any, make_cluster: Any, num_workers: int) -> Any:
    cluster = await make_cluster(both=num_workers, decode={"kv_capacity_tokens": 16_384})
    proxy.know_store(cluster.store)
    await asyncio.gather(*(worker.life.joined.wait() for worker in cluster.workers))
    return cluster


async def test_a_load_that_shifts_from_prompts_to_answers_makes_roles_change_by_themselves(
    make_proxy: Any, make_cluster: Any, greedy: Greedy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictors stay the cost model's: what is decided follows from the load and from nothing that this machine does."""
    for name in ("_note", "_note_link"):
        monkeypatch.setattr(Learner, name, lambda *_, **__: None)
    MODEL.save(tmp_path / "model.json")
    proxy = await make_proxy(policy="adaptive", cost_model=str(tmp_path / "model.json"), rebalance_s=0.05, **SLO)
    proxy.router.conductor.policy.calm_s = 0.05
    cluster = await joined(proxy, make_cluster, NUM_WORKERS)
    load = Load(proxy.router, greedy)
    found: list[int] = []  # numbers of workers that prefill for the others, as they changed

    def look(_: Any) -> None:
        found.append(sum(member.role == "prefill" for member in proxy.cluster.members.values()))

    proxy.cluster.on_role(look)
    async with asyncio.timeout(240):
        while not found or max(found) < 2:
            await load.burst(NUM_LONG, 200, 2, NUM_LONG)
        first = len(found)
        while min(found[first:], default=NUM_WORKERS) > 1:
            await load.burst(NUM_SHORT, 8, 40, 6)
    await proxy.router._rebalancer.close()  # so that nothing changes under the eyes of what follows
    await cluster.every_page_is_free()
    roles = [(worker, proxy.cluster.members[worker.worker_id]) for worker in cluster.workers]
    async with asyncio.timeout(60):
        while any(worker.role != member.role for worker, member in roles):
            await asyncio.sleep(0.01)  # a change was cut off: the worker says in its next report which role it has
    async with open_channel(cluster.members.address) as channel:
        status = await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest())
    assert status.outcomes == {"done": load.num_ended}, "no request failed or was refused"
    changes = [change for change in status.role_changes if not change.error]
    assert any("requests in SLO with" in change.reason for change in changes)
    assert {change.role for change in changes} == {control_pb2.ROLE_PREFILL, control_pb2.ROLE_DECODE}
    for member in status.members:
        latest = next((change for change in changes if change.member == member.info.id), None)
        if member.role_reason:
            assert latest is None or (member.role, member.role_reason) == (latest.role, latest.reason)


async def test_tokens_are_exact_and_nothing_is_left_over_where_roles_change_at_random_while_requests_run(
    make_proxy: Any, make_cluster: Any, greedy: Greedy
) -> None:
    proxy = await make_proxy(policy="adaptive", rebalance_s=10_000.0)
    cluster = await joined(proxy, make_cluster, 3)
    members = [proxy.cluster.members[worker.worker_id] for worker in cluster.workers]
    rng = random.Random(5)
    load = Load(proxy.router, greedy)
    num_changes, is_over = 0, False

    async def flip() -> None:
        nonlocal num_changes
        while not is_over:
            await proxy.cluster.set_role(rng.choice(members), rng.choice(("prefill", "decode", "both")), 60.0)
            num_changes += 1
            await asyncio.sleep(0.01)

    async with asyncio.timeout(240):
        flipping = asyncio.create_task(flip())
        await asyncio.gather(*(load.any_mix(random.Random(number), 6) for number in range(6)))
        while num_changes < 20:
            await load.any_mix(rng, 1)
        is_over = True
        await flipping
    await cluster.every_page_is_free()
    for worker, member in zip(cluster.workers, members, strict=True):
        assert (member.context.num_tokens, member.backlog.assigned.num_tokens, len(proxy.cluster._table.tasks)) == (0, 0, 0)
        assert worker.role == member.role
    outcomes = proxy.router.metrics.outcomes
    assert outcomes["done"] + outcomes["aborted"] == load.num_opened and outcomes["done"] >= load.num_ended
