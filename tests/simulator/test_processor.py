"""Instances that share a machine's cores, against a second account of processor sharing."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.clock import EventLoop
from halfmoon.simulator.cluster import Cluster
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.processor import Processor
from halfmoon.simulator.replay import Replay
from halfmoon.simulator.scenario import Scenario
from halfmoon.simulator.trace import TraceRequest


class Work:
    """Something that computes for so long, alone."""

    def __init__(self, loop: EventLoop, processor: Processor, seconds: float) -> None:
        self.done_s = 0.0
        self._loop, self._processor, self._seconds = loop, processor, seconds
        self._version = 0

    def begin(self) -> None:
        self._processor.enter(self)
        self._end_s = self._loop.now + self._seconds * self._processor.slowdown
        self._loop.at(self._end_s, self._end, 0)

    def stretch(self, factor: float) -> None:
        self._version += 1
        self._end_s = self._loop.now + (self._end_s - self._loop.now) * factor
        self._loop.at(self._end_s, self._end, self._version)

    def _end(self, version: int) -> None:
        if version == self._version:
            self.done_s = self._loop.now
            self._version += 1
            self._processor.leave(self)


def shared(starts: list[float], seconds: list[float], num_cores: float) -> list[float]:
    """When each is done, in small steps of time: in each, whoever has begun does its share."""
    left, done, now, tick = list(seconds), [0.0] * len(seconds), 0.0, 1e-3
    while any(rest > 0 for rest in left):
        running = [at for at, rest in enumerate(left) if starts[at] <= now and rest > 0]
        for at in running:
            left[at] -= tick * min(1.0, num_cores / len(running))
            if left[at] <= 0:
                done[at] = now + tick
        now += tick
    return done


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 10)), min_size=1, max_size=5), st.sampled_from([0.5, 1.0, 1.35, 2.0, 3.0]))
def test_work_ends_when_its_share_of_the_cores_has_done_it(works: list[tuple[int, int]], num_cores: float) -> None:
    loop, processor = EventLoop(), Processor(num_cores)
    starts, seconds = [start / 10 for start, _ in works], [length / 10 for _, length in works]
    found = [Work(loop, processor, length) for length in seconds]
    for work, start in zip(found, starts, strict=True):
        loop.at(start, work.begin)
    loop.run()
    assert [work.done_s for work in found] == pytest.approx(shared(starts, seconds, num_cores), abs=0.02)


def run(cost: CostModel, requests: list[TraceRequest], **changes: object) -> Result:
    scenario = Scenario(cost=cost, num_prefill=2, num_decode=2, policy="cache_aware", order="fair", one_node=True, **changes)  # type: ignore[arg-type]
    cluster = Cluster(scenario)
    cluster.run(Replay(requests, []))
    return Result(cluster)


def test_two_prompts_at_once_on_one_core_take_twice_as_long(small_cost: CostModel) -> None:
    prompts = [TraceRequest(0.0, 1000, 1, (1, 2)), TraceRequest(0.0, 1000, 1, (3, 4))]
    for num_cores, expected_s in ((2.0, 1.0), (1.0, 2.0)):
        rows = run(dataclasses.replace(small_cost, num_cores=num_cores), prompts).rows
        assert {row.prefill_instance for row in rows} == {"n0000", "n0001"}
        assert [row.prefill_done_s for row in rows] == pytest.approx([expected_s] * 2)


def test_a_prompt_on_the_same_machine_slows_the_steps_of_a_decode_batch(small_cost: CostModel) -> None:
    talking, reading = TraceRequest(0.0, 10, 101, (1,)), TraceRequest(0.5, 400, 1, (2,))
    alone = run(dataclasses.replace(small_cost, num_cores=1.0), [talking]).rows[0]
    assert alone.tpot_s == pytest.approx(0.011)
    both = run(dataclasses.replace(small_cost, num_cores=1.0), [talking, reading]).rows
    # 0.4 s of prefill at half speed take 0.8 s, in which the steps too go at half speed: 0.4 s of them are lost
    assert both[1].prefill_done_s - 0.5 == pytest.approx(0.8)
    assert both[0].tpot_s * 100 == pytest.approx(1.1 + 0.4)


def test_on_one_node_every_worker_finds_what_another_computed(small_cost: CostModel) -> None:
    busy = TraceRequest(0.0, 3000, 1, (1, 2, 3, 4, 5, 6))  # keeps the first worker; the second computes what the third prompt needs
    requests = [busy, TraceRequest(0.1, 600, 1, (7, 8)), TraceRequest(2.9, 1100, 1, (1, 2, 9)), TraceRequest(3.5, 1100, 1, (7, 9, 10))]
    rows = run(small_cost, requests).rows
    assert rows[3].num_cached_tokens == 512
    apart = Scenario(cost=small_cost, num_prefill=2, num_decode=2, policy="round_robin", order="fair", remote_prefix=False)
    cluster = Cluster(apart)
    cluster.run(Replay([TraceRequest(0.0, 600, 1, (7, 8)), TraceRequest(3.0, 600, 1, (7, 9))], []))
    assert Result(cluster).rows[1].num_cached_tokens == 0, "not where each has a store of its own"


def test_a_request_is_late_by_what_it_costs_beside_the_prefill_and_no_worker_is_busy_with_that(small_cost: CostModel) -> None:
    requests = [TraceRequest(0.0, 1000, 1, (1, 2)), TraceRequest(0.0, 1000, 1, (3, 4)), TraceRequest(0.0, 1000, 1, (5, 6))]
    plain, costly = (run(dataclasses.replace(small_cost, request_s=request_s), requests).rows for request_s in (0.0, 0.3))
    assert [row.ttft_s for row in costly] == pytest.approx([row.ttft_s + 0.3 for row in plain])
    assert [row.prefill_done_s for row in costly] == [row.prefill_done_s for row in plain]
