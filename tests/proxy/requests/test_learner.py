"""Which measurements are learnt from."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.predictors import CostModel, Predictors
from halfmoon.proxy.conductor.predictors.outlier_filter import OutlierFilter
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.requests.learner import Learner


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
