"""deploy/profile_fit.py against measurements made from known cost models."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.deploy.profile_fit import (
    ALONE,
    Busy,
    Facts,
    Points,
    PrefillPoint,
    RequestPoint,
    StepPoint,
    fit,
    non_negative,
    predicted_prefill,
    predicted_step,
    slowdown,
)
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.predictors import CostModel

TRUTH = CostModel(
    name="truth", prefill_s=0.01, per_token_s=1.2e-4, per_token_prefix_s=1.5e-7, per_token_squared_s=9e-8, step_s=0.0036,
    per_sequence_s=6e-4, per_kv_token_s=1.4e-6, kv_bytes_per_token=8192, num_layers=8, kv_capacity_tokens=32768, cache_tokens=65536,
    link_bytes_per_s=4e9, request_s=0.009, num_cores=1.5,
)  # fmt: skip
FACTS = Facts("truth", 8192, 8, 32768, 65536, shares_cores=True)


def measured(noise: float = 0.0, seed: int = 0, truth: CostModel = TRUTH) -> Points:
    """As a profile would measure truth. noise: relative deviation of every one."""
    rng = random.Random(seed)

    def noisy(seconds: float) -> float:
        return seconds * max(1.0 + rng.gauss(0.0, noise), 0.1)

    def slow(num_busy: int) -> float:  # written down a second time: seconds of work that is done at the share of the cores one gets
        return 1.0 / min(1.0, truth.num_cores / num_busy) if truth.num_cores else 1.0

    prefill = [
        PrefillPoint(new, prefix, noisy(truth.prefill_time(new, prefix) * slow(busy)), ((busy, 1.0),))
        for new, prefix, busy in itertools.product((16, 64, 256, 512, 1024, 2048), (0, 704, 1472, 3008), (1, 3, 4))
    ]
    steps = [
        StepPoint(size, size * length, noisy(truth.step_time(size, size * length) * slow(busy)), ((busy, 1.0),))
        for size, length, busy in itertools.product((1, 2, 4, 8, 16), (64, 512, 1500), (1, 2, 4))
    ]
    requests = []
    for prefix, new in itertools.product((0, 1024, 2048), (64, 512, 2048)):
        loaded, pushed = prefix * 8192, new * 8192
        handed_off_s = 0.001 + pushed / 8 / truth.link_bytes_per_s
        beside_s = truth.request_s + pushed / 8 / truth.link_bytes_per_s
        requests.append(RequestPoint(loaded, noisy(0.002 + loaded / truth.link_bytes_per_s), pushed, noisy(handed_off_s), noisy(beside_s)))
    return Points(prefill, steps, requests)


def test_what_was_made_from_a_cost_model_gives_that_cost_model() -> None:
    found = fit(measured(), FACTS)
    for name in ("prefill_s", "per_token_s", "per_token_prefix_s", "per_token_squared_s", "step_s", "per_sequence_s", "per_kv_token_s",
                 "link_bytes_per_s", "request_s", "num_cores"):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    assert (found.kv_bytes_per_token, found.num_layers, found.kv_capacity_tokens, found.cache_tokens) == (8192, 8, 32768, 65536)


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_of_noisy_measurements_predicts_the_truth(seed: int) -> None:
    found = fit(measured(noise=0.1, seed=seed), FACTS)
    truth = measured()
    for points, predicted in ((truth.prefill, predicted_prefill), (truth.steps, predicted_step)):
        errors = [predicted(found, point) / point.seconds - 1.0 for point in points]  # type: ignore[operator]
        assert abs(float(np.mean(errors))) < 0.05, "as many above as below"
        assert float(np.percentile(np.abs(errors), 90)) < 0.15


def test_a_fit_lies_at_the_mean_and_not_below_it() -> None:
    features = np.ones((1000, 1))
    seconds = np.array([0.5, 1.5] * 500)
    assert non_negative(features, seconds)[0] == pytest.approx(1.0)
    # relative to what was measured, the least squares would be at 0.6
    assert np.linalg.lstsq(features / seconds[:, None], np.ones(1000), rcond=None)[0][0] == pytest.approx(0.6)


@given(st.integers(0, 10_000))
def test_no_weight_is_negative_and_none_can_be_moved_for_a_better_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0.1, 1.0, (12, 3))
    seconds = features @ np.array([1.0, 0.0, 0.5]) * rng.uniform(0.6, 1.4, 12)
    weights = non_negative(features, seconds)
    assert (weights >= 0).all()
    # the Kuhn-Tucker conditions of the last round: flat in what is used, uphill in what is not
    unit = np.maximum(features @ weights, seconds / 10)
    slope = (features / unit[:, None]).T @ ((features @ weights - seconds) / unit)
    assert (np.abs(slope[weights > 0]) < 0.05).all() and (slope[weights == 0] > -0.05).all()


def test_workers_that_have_a_device_each_are_not_held_to_share_cores() -> None:
    apart = Facts("truth", 8192, 8, 32768, 65536, shares_cores=False)
    alone = [point for point in measured().prefill if point.busy == ALONE], [point for point in measured().steps if point.busy == ALONE]
    assert fit(Points(*alone, measured().requests), apart).num_cores == 0.0


def test_cores_that_are_enough_for_all_are_no_limit() -> None:
    unhindered = CostModel(**{name: getattr(TRUTH, name) for name in TRUTH.__slots__ if name != "num_cores"})
    assert fit(measured(truth=unhindered), FACTS).num_cores == 0.0


@pytest.mark.parametrize(
    ("busy", "num_cores", "expected"),
    [
        (((2, 1.0),), 1.0, 2.0),
        (((1, 1.0),), 1.0, 1.0),
        (((4, 1.0),), 0.0, 1.0),
        (((1, 0.5), (2, 0.5)), 1.0, 4 / 3),  # half of the time at full speed, half at half
    ],
)
def test_work_beside_others_goes_on_at_its_share_of_the_cores(busy: Busy, num_cores: float, expected: float) -> None:
    assert slowdown(busy, num_cores) == pytest.approx(expected)


def test_a_link_too_fast_to_be_seen_counts_as_the_fastest_transfer() -> None:
    points = measured()
    flat = [RequestPoint(one.num_bytes_loaded, 0.002, 8192, 0.001, 0.01) for one in points.requests]
    assert fit(Points(points.prefill, points.steps, flat), FACTS).link_bytes_per_s == pytest.approx(2048 * 8192 / 0.002)


def test_too_few_measurements_are_refused_with_their_number() -> None:
    points = measured()
    one_batch = [point for point in points.steps if point.num_sequences == 1]
    with pytest.raises(ConfigError, match="6 prompt lengths, 4 prefixes, 1 batch sizes"):
        fit(Points(points.prefill, one_batch, points.requests), FACTS)
