from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.timing.step_cost import StepWork
from halfmoon.proxy.conductor.placement import MemberState
from halfmoon.proxy.conductor.predictors import CostModel, Predictors, RecursiveLeastSquares, queue_s

TRUE = CostModel(
    prefill_s=0.005, per_token_s=1e-4, per_token_prefix_s=2e-9, per_token_squared_s=1e-9, step_s=0.02, per_sequence_s=1e-4,
    per_kv_token_s=1e-7, kv_bytes_per_token=100_000, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=2e9,
)  # fmt: skip


@settings(max_examples=50)
@given(seed=st.integers(0, 2**20))
def test_recursive_least_squares_ends_at_the_ridge_solution_of_all_it_saw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, start, trust = rng.normal(size=(60, 4)), rng.normal(size=4), 3.0
    targets = features @ rng.normal(size=4) + rng.normal(size=60) * 0.1
    fit = RecursiveLeastSquares(list(start), [1 / trust] * 4, forgetting=1.0)
    for row, target in zip(features, targets, strict=True):
        fit.observe(list(row), float(target))
    ridge = np.linalg.solve(features.T @ features + trust * np.eye(4), features.T @ targets + trust * start)
    assert np.allclose(fit.weights, ridge, rtol=1e-6, atol=1e-8)


def test_a_regression_over_one_single_input_again_and_again_does_not_blow_up() -> None:
    fit = RecursiveLeastSquares([0.0, 0.0], [1.0, 1.0], forgetting=0.99)
    for _ in range(20_000):
        fit.observe([1.0, 1.0], 2.0)
    assert fit.predict([1.0, 1.0]) == pytest.approx(2.0, rel=1e-3)
    assert all(abs(weight) < 10 for weight in fit.weights)


def test_predictors_of_a_profile_tell_the_profile() -> None:
    found = Predictors(TRUE)
    assert found.prefill.predict(1000, 5000) == pytest.approx(TRUE.prefill_time(1000, 5000))
    assert found.step.predict(20, 300_000) == pytest.approx(TRUE.step_time(20, 300_000))
    assert found.transfer.predict(2e9, in_flight=1) == pytest.approx(2.0)


def test_wrong_predictors_learn_the_machine_from_its_records_and_know_their_error() -> None:
    slow = dataclasses.replace(TRUE, per_token_s=5e-4, step_s=0.1, per_kv_token_s=1e-6)
    found = Predictors(slow)
    rng = random.Random(1)
    for _ in range(600):
        new, prefix = rng.randint(64, 8000), rng.randint(0, 30_000)
        found.prefill.observe(new, prefix, TRUE.prefill_time(new, prefix) * rng.uniform(0.98, 1.02))
        batch, tokens = rng.randint(1, 64), rng.randint(1000, 600_000)
        work = StepWork(num_decodes=batch, num_context_tokens=tokens)
        found.step.observe(work, TRUE.step_time(batch, tokens) * rng.uniform(0.98, 1.02))
    assert found.prefill.predict(4000, 10_000) == pytest.approx(TRUE.prefill_time(4000, 10_000), rel=0.05)
    assert found.step.predict(30, 200_000) == pytest.approx(TRUE.step_time(30, 200_000), rel=0.05)
    assert 0.0 < found.prefill.error.mean_relative < 0.1


def test_a_link_that_is_slower_than_the_profile_is_learnt_by_itself() -> None:
    found = Predictors(TRUE)
    rng = random.Random(2)
    for _ in range(300):
        num_bytes, in_flight = rng.uniform(1e8, 4e9), rng.randint(0, 4)
        found.transfer.observe(num_bytes, 0.01 + num_bytes / 5e8 * (1 + in_flight), "grpc", in_flight)
    assert found.transfer.predict(2e9, "grpc", 2) == pytest.approx(12.01, rel=0.05)
    assert found.transfer.predict(2e9, "shm") == pytest.approx(1.0)


def test_a_prefix_in_the_workers_own_store_is_free_until_loading_one_was_seen() -> None:
    found = Predictors(TRUE)
    found.transfer.observe(1e9, 0.5, "grpc")
    assert found.transfer.own(1e9) == 0.0
    for num_bytes in (1e8, 5e8, 1e9) * 30:
        found.transfer.observe(num_bytes, 0.002 + num_bytes / 2e10, "shm")
    assert found.transfer.own(1e9) == pytest.approx(0.052, rel=0.05)
    assert found.transfer.own(0.0) == 0.0


def test_a_queue_is_its_predicted_end_or_its_tokens_where_no_end_is_told() -> None:
    found = Predictors(TRUE)
    assert queue_s(found, MemberState("p", "p", "s", busy_until_s=12.0), 10.0) == 2.0
    assert queue_s(found, MemberState("p", "p", "s", busy_until_s=9.0), 10.0) == 0.0
    assert queue_s(found, MemberState("p", "p", "s", num_outstanding_tokens=1000), 10.0) == found.prefill.predict(1000, 0)


def test_a_cost_model_comes_back_from_its_file(tmp_path: Path) -> None:
    TRUE.save(tmp_path / "model.json")
    assert CostModel.load(tmp_path / "model.json") == TRUE


@pytest.mark.parametrize(
    ("text", "told"),
    [("per_tokn_s: 1", "per_token_s"), ("step_s: 1.0", "missing"), ("[", "not YAML"), ("- 1", "key: value")],
)
def test_a_file_that_is_no_cost_model_is_refused_with_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        CostModel.load(tmp_path / "model.yaml")


def test_a_cost_model_without_a_link_is_refused() -> None:
    with pytest.raises(ValueError, match="link_bytes_per_s"):
        dataclasses.replace(TRUE, link_bytes_per_s=0.0)
    assert math.isfinite(TRUE.prefill_time(1, 0))
