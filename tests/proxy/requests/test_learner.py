"""Which measurements are learnt from."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.timing.step_cost import StepWork, attention_of
from halfmoon.protocol.v1 import common_pb2, control_pb2
from halfmoon.proxy.conductor.predictors import CostModel, Predictors
from halfmoon.proxy.conductor.predictors.outlier_filter import OutlierFilter
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.requests.learner import STEPS_AT_ONCE, STEPS_PER_S, Learner


def test_one_hiccup_is_not_learnt_and_a_new_truth_is() -> None:
    outlier_filter = OutlierFilter()
    assert outlier_filter.admits(1.0, 1.3) and outlier_filter.admits(1.0, 0.3)
    assert not outlier_filter.admits(1.0, 900.0), "once"
    assert outlier_filter.admits(1.0, 2.0), "and the next usual one counts as before"
    assert [outlier_filter.admits(1.0, 20.0), outlier_filter.admits(2.0, 50.0), outlier_filter.admits(1.0, 18.0)] == [False, False, True], (
        "three that agree"
    )


def test_a_part_of_the_load_that_is_far_off_is_learnt_though_the_rest_is_not() -> None:
    outlier_filter = OutlierFilter()
    seen = [outlier_filter.admits(1.0, 10.0 if number % 5 == 0 else 1.0) for number in range(20)]
    assert [seen[number] for number in (0, 5, 10, 15)] == [False, False, True, True]


def test_what_no_clock_resolves_is_not_learnt() -> None:
    assert not OutlierFilter().admits(1.0, 0.0)
    outlier_filter = OutlierFilter()
    assert [outlier_filter.admits(0.0, 0.5) for _ in range(3)] == [False, False, True], "a prediction of nothing is just far off"


@pytest.mark.parametrize("factor", [0.001, 0.05, 1.0, 20.0, 3000.0])
def test_a_first_prefill_that_compiles_leaves_a_fit_that_finds_the_machine(factor: float) -> None:
    """factor: how much slower the machine is than the guess."""
    rng, predictors = random.Random(1), Predictors.guess()
    learner = Learner(predictors, ProxyMetrics(CollectorRegistry()))
    truth = CostModel(**{**{name: getattr(predictors.model, name) for name in predictors.model.__slots__}, "per_token_s": 1e-4 * factor,
                         "per_token_prefix_s": 1e-9 * factor, "per_token_squared_s": 5e-10 * factor})  # fmt: skip
    learnt: list[float] = []
    for number in range(60):
        new, prefix = rng.randint(50, 4000), rng.choice((0, 1024, 8192))
        measured_s = truth.prefill_time(new, prefix) * rng.uniform(0.95, 1.05) + (40.0 if number == 0 else 0.0)
        predicted_s = predictors.prefill.predict(new, prefix)
        learnt.append(abs(predicted_s - measured_s) / measured_s)
        state = common_pb2.HandoffState(num_tokens=new + prefix, num_cached_tokens=prefix)
        state.phases.compute_s = measured_s
        learner.prefilled(state, 0)
    assert max(learnt[-30:]) < 0.3 and sum(learnt[-30:]) / 30 < 0.08


def test_prompts_that_were_cached_whole_say_nothing_of_those_that_are_not() -> None:
    """One token costs a step's constant, many times what the guess has for a token; that is no word on a thousand tokens."""
    predictors = Predictors.guess()
    learner = Learner(predictors, ProxyMetrics(CollectorRegistry()))
    for new in [1024] * 8 + [1] * 5:
        state = common_pb2.HandoffState(num_tokens=1024, num_cached_tokens=1024 - new)
        state.phases.compute_s = 0.010 + 3.3e-4 * new
        learner.prefilled(state, 0)
    assert predictors.prefill.predict(1024, 0) == pytest.approx(0.348, rel=0.15)
    assert predictors.prefill.predict(1, 1023) < 0.03


def test_a_hand_off_is_learnt_from_nothing_and_never_runs_away() -> None:
    """The guess has no time for it, and a ratio to nothing is no ratio."""
    rng, predictors = random.Random(2), Predictors.guess()
    learner = Learner(predictors, ProxyMetrics(CollectorRegistry()))
    for number in range(60):
        num_bytes = rng.randint(1, 40) * 2**20
        record = common_pb2.PhaseRecord(queue_s=0.001, prefill_queue_s=0.01, prefill_s=0.1, prefill_compute_s=0.1)
        record.ttft_s = 0.111 + (0.05 + num_bytes / 1e9) * rng.uniform(0.9, 1.1) + (7.0 if number in (0, 20) else 0.0)
        learner.handed_off(record, num_bytes, "net")
        assert predictors.handoff.predict(num_bytes, "net") < 1.0
    assert predictors.handoff.predict(20 * 2**20, "net") == pytest.approx(0.05 + 20 * 2**20 / 1e9, rel=0.15)
    assert predictors.handoff.predict(20 * 2**20, "node") == 0.0, "of the other kind nothing was seen"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Worker:
    """A decode worker that reports ten steps five times a second, as a machine of `factor` times the guess's seconds takes them."""

    def __init__(self, seed: int, truth: CostModel) -> None:
        self._rng, self._truth = random.Random(seed), truth

    def report(self) -> control_pb2.MemberLoad:
        steps = []
        for _ in range(10):
            num, tokens = self._rng.randint(1, 64), self._rng.randint(1000, 200_000)
            seconds = self._truth.step_time(num, tokens) * self._rng.uniform(0.97, 1.03)
            steps.append(control_pb2.StepSample(num_sequences=num, num_kv_tokens=tokens, seconds=seconds))
        return control_pb2.MemberLoad(steps=steps)


def run_cluster(num_workers: int, seconds: float, factor: float) -> tuple[Predictors, CostModel, list[int]]:
    """What was learnt, what is so, and how many samples of each worker were looked at."""
    predictors, clock = Predictors.guess(), Clock()
    model = predictors.model
    truth = dataclasses.replace(
        model, step_s=model.step_s * factor, per_sequence_s=model.per_sequence_s * factor, per_kv_token_s=model.per_kv_token_s * factor
    )
    learner = Learner(predictors, ProxyMetrics(CollectorRegistry()), clock)
    workers = [Worker(number, truth) for number in range(num_workers)]
    looked_at = [0] * num_workers
    nobody: Any = None
    for _ in range(round(seconds * 5)):
        for number, worker in enumerate(workers):
            clock.now_s += 0.2 / num_workers
            before = predictors.step.error.num_observations
            learner.reported(nobody, worker.report())
            looked_at[number] += predictors.step.error.num_observations - before
    return predictors, truth, looked_at


def test_every_step_of_a_small_cluster_is_looked_at() -> None:
    _, _, looked_at = run_cluster(3, 4.0, 1.0)
    assert looked_at == [200, 200, 200]


def test_a_large_cluster_is_learnt_from_at_a_bounded_rate_from_all_of_its_workers_and_as_well() -> None:
    num_workers, seconds = 400, 10.0
    predictors, truth, looked_at = run_cluster(num_workers, seconds, 3.0)
    assert sum(looked_at) <= STEPS_AT_ONCE + STEPS_PER_S * seconds * 1.05
    assert sum(looked_at) >= STEPS_PER_S * seconds * 0.8
    assert sum(number > 0 for number in looked_at) > 0.9 * num_workers, "workers that report in step are not passed over"
    for num, tokens in ((1, 2000), (30, 90_000), (64, 200_000)):
        assert predictors.step.predict(num, tokens) == pytest.approx(truth.step_time(num, tokens), rel=0.05)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_mixed_steps_correct_what_a_chunk_beside_a_batch_costs(factor: float) -> None:
    """What the Conductor judges local prefill by. It begins 30 % off, and sees nothing but steps that do both."""
    rng, truth = random.Random(5), dataclasses.replace(Predictors.guess().model, per_token_s=2e-5, step_s=5e-3, per_sequence_s=1e-5)
    predictors = Predictors(dataclasses.replace(truth, per_token_s=truth.per_token_s * factor))
    clock, nobody = [0.0], cast("Any", None)
    learner = Learner(predictors, ProxyMetrics(CollectorRegistry()), clock=lambda: clock[0])
    for _ in range(40):
        clock[0] += 1.0
        load = control_pb2.MemberLoad()
        for _ in range(10):
            num, new, prefix = rng.randint(1, 30), rng.choice((256, 512, 1024)), rng.randint(0, 8000)
            tokens = num * rng.randint(500, 8000)
            seconds = truth.mixed_time([(new, prefix)], num, tokens) * rng.uniform(0.97, 1.03)
            attention = attention_of(new, prefix)
            load.steps.add(num_sequences=num, num_kv_tokens=tokens, num_prefill_tokens=new, prefill_attention=attention, seconds=seconds)
        learner.reported(nobody, load)
    for new in (256, 1024):
        work = StepWork(new, attention_of(new, 4000), 16, 60_000)
        assert predictors.step.cost.seconds(work) == pytest.approx(truth.mixed_time([(new, 4000)], 16, 60_000), rel=0.07)
