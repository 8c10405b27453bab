"""The simulated cluster: a trace worked out by hand, and what must hold for every trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.cluster import Cluster, simulate
from halfmoon.simulator.loads import Load
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import Replay
from halfmoon.simulator.scenario import Failure, Scenario
from halfmoon.simulator.trace import TraceRequest

Talk = Callable[..., Replay]


def request(arrival_s: float, num_input: int, num_output: int, *blocks: int) -> TraceRequest:
    return TraceRequest(arrival_s, num_input, num_output, blocks)


def test_a_tiny_trace_takes_the_seconds_that_a_hand_computes(small_cost: CostModel) -> None:
    # one prefill and one decode instance; 1 ms a token, steps of 10 ms + 1 ms a sequence, 1 KB a token over 1 GB/s
    replay = Replay([request(0.0, 1024, 3, 1, 2), request(0.5, 1100, 2, 1, 2, 3)], [])
    rows = Result(simulate(Scenario(cost=small_cost, num_prefill=1, num_decode=1), replay)).rows
    first, second = rows
    # 1024 tokens prefilled in 1.024 s; one layer only, so all bytes leave at the end: 1.024 MB take 1.024 ms
    assert first.prefill_done_s == pytest.approx(1.024)
    assert first.ttft_s == pytest.approx(1.024 + 0.001024)
    assert first.e2e_s == pytest.approx(first.ttft_s + 2 * 0.011)  # two more tokens, alone in the batch
    assert first.tbt_s == pytest.approx(0.011)
    # the second waits for the first and shares its two blocks: 76 tokens are new
    assert second.num_cached_tokens == 1024
    assert second.prefill_start_s == pytest.approx(1.024)
    assert second.prefill_done_s == pytest.approx(1.1)
    assert second.ttft_s == pytest.approx(0.6 + 0.0011)
    assert second.e2e_s == pytest.approx(second.ttft_s + 0.011)


def test_two_sequences_in_a_batch_step_together_and_one_that_comes_in_between_waits_for_the_step(small_cost: CostModel) -> None:
    cost = dataclasses.replace(small_cost, link_bytes_per_s=1e15)
    replay = Replay([request(0.0, 100, 4, 1), request(0.0, 105, 3, 2)], [])
    rows = Result(simulate(Scenario(cost=cost, num_prefill=2, num_decode=1, policy="round_robin"), replay)).rows
    assert rows[0].ttft_s == pytest.approx(0.1)
    # at 0.105 the second arrives, the first's step ends at 0.111: then both step in 12 ms
    assert rows[1].ttft_s == pytest.approx(0.111)
    assert rows[1].e2e_s == pytest.approx(0.111 + 2 * 0.012)
    assert rows[0].e2e_s == pytest.approx(0.111 + 2 * 0.012)


def test_a_coupled_instance_mixes_a_chunk_into_the_decode_step(small_cost: CostModel) -> None:
    replay = Replay([request(0.0, 128, 100, 1), request(0.2, 256, 1, 2)], [])
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=0, coupled=True, chunk_tokens=128)
    rows = Result(simulate(scenario, replay)).rows
    assert rows[0].ttft_s == pytest.approx(0.128)
    # steps of 11 ms from 0.128; the first that begins after 0.2 begins at 0.205, and two mixed ones follow, of 128 + 1 ms: the 10 ms
    # that every step takes are under the chunk
    assert rows[1].ttft_s == pytest.approx(0.205 + 2 * (0.001 + 0.128) - 0.2)
    assert rows[0].tbt_s == pytest.approx((2 * (0.001 + 0.128) + 8 * 0.011) / 10)


SCENARIOS: dict[str, dict[str, Any]] = {
    "kvcache_centric": {},
    "random without remote prefixes": {"policy": "random", "remote_prefix": False, "order": "fcfs"},
    "cache_aware, fair queue": {"policy": "cache_aware", "order": "fair"},
    "coupled": {"coupled": True, "chunk_tokens": 128},
    "adaptive": {"policy": "adaptive", "order": "late", "slo": Slo(2.0, 0.05)},
    "predictive, cached on decode": {"admission": "predictive", "slo": Slo(1.5, 0.016), "cache_on_decode": True},
    "two stages": {"admission": "two_stage", "slo": Slo(1.5, 0.016)},
    "failures": {"failures": (Failure(3.0, "n0000", 2.0), Failure(4.0, "n0003", 1.0), Failure(9.0, "n0001"))},
    "adaptive with failures": {"policy": "adaptive", "failures": (Failure(3.0, "n0000", 2.0), Failure(4.0, "n0003", 1.0))},
}


class Watched(Cluster):
    """Looks at every page pool and cache whenever an instance tells something."""

    def _look(self) -> None:
        for instance in self.instances:
            held = sum(len(one.pages) for one in [*instance.prefill.jobs, *instance.decode.jobs])
            assert held <= instance.allocator.num_pages
            assert instance.allocator.num_pages * self.scenario.page_size <= self.scenario.cost.kv_capacity_tokens
            slots = instance.cache.dram_slots
            assert slots.num_leased + slots.num_cached + slots.num_free == slots.num_slots

    def prefill_done(self, job: Any) -> None:
        super().prefill_done(job)
        self._look()

    def decode_done(self, job: Any) -> None:
        super().decode_done(job)
        self._look()


@pytest.mark.parametrize("name", SCENARIOS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**20), num=st.integers(1, 60))
def test_every_request_ends_exactly_once_and_nothing_is_left(small_cost: CostModel, talk: Talk, name: str, seed: int, num: int) -> None:
    scenario = Scenario(cost=small_cost, num_prefill=2, num_decode=2).with_(**SCENARIOS[name])
    cluster = Watched(scenario)
    jobs = cluster.run(talk(num, seed, gap_s=0.1))
    assert len(jobs) == num
    for job in jobs:
        assert job.outcome in ("done", "rejected_at_arrival", "rejected_at_decode")
        if job.outcome == "done":
            assert job.num_output_tokens_sent == job.request.num_output_tokens
            assert job.request.arrival_s <= job.first_token_s <= job.done_s
            assert job.prefill_done_s <= job.first_token_s or job.attempt > 1
    for instance in cluster.instances:
        assert instance.allocator.num_free == instance.allocator.num_pages
        assert instance.prefill.scheduler.at_rest and instance.decode.batch.at_rest
        assert not instance.decode.promised and instance.decode.num_promised_tokens == 0
        assert instance.prefill.num_left_tokens == 0 and instance.prefill.num_fed_tokens == 0
        assert instance.cache.dram_slots.num_leased == 0


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_bytes_moved_are_the_bytes_asked_for(small_cost: CostModel, talk: Talk, seed: int) -> None:
    cluster = simulate(Scenario(cost=small_cost, num_prefill=2, num_decode=2), talk(50, seed))
    asked = sum(job.num_tokens for job in cluster.jobs) * small_cost.kv_bytes_per_token
    assert cluster.counters.handoff_bytes == asked
    moved = asked + cluster.counters.prefix_bytes
    assert sum(instance.egress.num_bytes for instance in cluster.instances) == moved
    assert sum(instance.ingress.num_bytes for instance in cluster.instances) == moved


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_seed_gives_the_same_floats(small_cost: CostModel, talk: Talk, name: str) -> None:
    scenario = Scenario(cost=small_cost, num_prefill=2, num_decode=2, seed=7).with_(**SCENARIOS[name])
    one, other = (Result(simulate(scenario, talk(60, 3))).rows for _ in range(2))
    assert one == other


def test_another_seed_gives_random_another_run(small_cost: CostModel, talk: Talk) -> None:
    scenario = Scenario(cost=small_cost, num_prefill=4, num_decode=2, policy="random")
    one, other = (Result(simulate(scenario.with_(seed=seed), talk(60, 3))).rows for seed in (1, 2))
    assert one != other


def test_a_dead_instance_costs_a_replay_and_no_request(small_cost: CostModel) -> None:
    replay = Replay([request(0.0, 600, 200, 1, 2)], [])
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=2)
    calm = simulate(scenario, replay).jobs[0]
    assert calm.decode_on
    cluster = simulate(scenario.with_(failures=(Failure(1.5, calm.decode_on),)), replay)
    job = cluster.jobs[0]
    assert job.outcome == "done" and job.attempt == 2
    assert job.num_output_tokens_sent == 200
    assert job.decode_on and job.decode_on != calm.decode_on
    assert job.num_sent_tokens > 50, "what was sent before the failure is not sent again"
    assert job.done_s > calm.done_s


def test_without_a_live_instance_requests_wait_for_one_and_end_rejected_where_none_comes(small_cost: CostModel) -> None:
    replay = Replay([request(1.0, 600, 5, 1, 2)], [])
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=1)
    back = simulate(scenario.with_(failures=(Failure(0.5, "n0000", 2.0),)), replay).jobs[0]
    assert back.outcome == "done" and back.first_token_s > 2.5
    gone = simulate(scenario.with_(failures=(Failure(0.5, "n0000"),)), replay).jobs[0]
    assert gone.outcome == "rejected_at_arrival"


def test_prefixes_come_from_the_other_node_where_it_holds_more(small_cost: CostModel) -> None:
    # a long prompt keeps the first instance busy, so that the shared prefix is wanted on the other
    replay = Replay([request(0.0, 1024, 1, 1, 2), request(1.1, 3000, 1, 9, 10, 11, 12, 13, 14), request(1.2, 1100, 1, 1, 2, 3)], [])
    scenario = Scenario(cost=small_cost, num_prefill=2, num_decode=1)
    with_remote, without = (simulate(scenario.with_(remote_prefix=remote), replay) for remote in (True, False))
    assert with_remote.jobs[2].num_cached_tokens == 1024
    if with_remote.jobs[2].prefill_on != "n0000":
        assert with_remote.counters.prefix_bytes == 1024 * small_cost.kv_bytes_per_token
    assert without.counters.prefix_bytes == 0


@pytest.mark.parametrize(("load", "rate"), [(Load("answers", 60, 200), 6.0), (Load("prompts", 700, 8), 1.4)])
def test_adaptive_on_two_instances_holds_what_a_coupled_cluster_holds_and_a_split_does_not(
    small_cost: CostModel, load: Load, rate: float
) -> None:
    """Where all the work is of one kind, one of the split's two instances idles."""
    slo = Slo(2.0, 0.05)
    requests = Replay(list(load.make(250, rate, 1).requests), [])
    base = Scenario(cost=small_cost, num_prefill=1, num_decode=1, slo=slo)
    arms = [base, base.with_(coupled=True, num_prefill=2, num_decode=0), base.with_(policy="adaptive")]
    split, coupled, adaptive = (Result(simulate(arm, requests)).attainment(slo) for arm in arms)
    assert split < 0.9 * coupled
    assert adaptive >= coupled - 0.02


def test_roles_that_change_take_their_time(small_cost: CostModel, talk: Talk) -> None:
    scenario = Scenario(cost=small_cost, num_prefill=2, num_decode=2, policy="adaptive", role_change_s=0.25)
    cluster = simulate(scenario, talk(20, 5))
    assert [(moment, role) for moment, _, role in cluster.role_changes[:2]] == [(0.25, "decode")] * 2


def test_what_a_step_takes_differs_by_its_jitter_and_not_on_average(small_cost: CostModel, talk: Talk) -> None:
    base = Scenario(cost=small_cost, num_prefill=1, num_decode=1)
    calm, shaken = (Result(simulate(base.with_(step_jitter=jitter), talk(60, 3))) for jitter in (0.0, 0.1))
    assert calm.rows != shaken.rows
    assert shaken.quantiles("tpot_s").mean == pytest.approx(calm.quantiles("tpot_s").mean, rel=0.05)


def test_a_prefix_in_the_own_store_takes_its_load_and_one_in_pages_takes_none(small_cost: CostModel) -> None:
    # 1024 tokens of 1 KB at 1 MB/s: a second
    cost = dataclasses.replace(small_cost, own_load_bytes_per_s=1e6)
    replay = Replay([request(0.0, 1024, 1, 1, 2), request(3.0, 1100, 1, 1, 2, 3)], [])
    scenario = Scenario(cost=cost, num_prefill=1, num_decode=1)
    kept = Result(simulate(scenario, replay)).rows[1]
    assert kept.num_cached_tokens == 1024 and kept.prefill_start_s == pytest.approx(3.0)
    # a prompt between them needs 31 of the 32 blocks that pages are there for: one of the two gives way
    between = Replay([replay.requests[0], request(1.5, 16_000, 1, *range(10, 42)), request(30.0, 1100, 1, 1, 2, 3)], [])
    loaded = Result(simulate(scenario, between)).rows[2]
    assert loaded.num_cached_tokens == 1024 and loaded.prefill_start_s == pytest.approx(30.512)


@pytest.mark.parametrize("ssd_bytes_per_s", [1e9, 1e6, 0.9e6])
def test_a_prefix_on_ssd_is_read_where_that_is_faster_than_computing_it(small_cost: CostModel, ssd_bytes_per_s: float) -> None:
    cost = dataclasses.replace(small_cost, cache_tokens=1536, ssd_tokens=100_000, ssd_bytes_per_s=ssd_bytes_per_s, link_bytes_per_s=1e15)
    # 1024 tokens are 1.024 MB; the second request pushes the first one's two blocks out of DRAM, which holds three
    replay = Replay([request(0.0, 1024, 1, 1, 2), request(5.0, 1536, 1, 3, 4, 5), request(10.0, 1100, 1, 1, 2, 6)], [])
    last = Result(simulate(Scenario(cost=cost, num_prefill=1, num_decode=1), replay)).rows[-1]
    read_s = 1.024e6 / ssd_bytes_per_s
    assert last.num_cached_tokens == (1024 if read_s <= 1.024 else 0)
    assert last.ttft_s == pytest.approx(min(read_s + 0.076, 1.1))
    assert last.predicted_ttft_s == pytest.approx(last.ttft_s, rel=0.01)
