from __future__ import annotations

import random

import numpy as np
import pytest

from halfmoon.protocol.timing.regression import RecursiveLeastSquares, RelativeFit

TRUE = (4.8, 0.3, 22.5, 0.2, 0.06, 3.0)  # one size each, as of a step's features


def a_step(random_: random.Random) -> tuple[float, ...]:
    """Of a busy worker's features: a chunk or none, its attention over a short or a long prefix, decode rows, their context."""
    chunk = random_.choice((0, 0, 64, 256, 512, 2048)) / 1024
    prefix = random_.choice((0, 1, 8, 30, 60))
    decodes = random_.randint(0, 60) / 10
    return (float(chunk == 0), float(chunk > 0), chunk, chunk * (prefix + chunk / 2), decodes, decodes * random_.uniform(0.5, 0.9))


@pytest.mark.parametrize("forgetting", [0.9, 0.995, 1.0])
def test_the_weights_are_those_of_the_whole_sum_of_squares_where_old_ones_fade(forgetting: float) -> None:
    """Independent: numpy solves the sum at once. What fades is replaced by what was believed then, at the first doubt."""
    random_ = random.Random(1)
    variances = np.array([400.0, 400.0, 100.0, 4.0, 4.0, 4.0])
    prior = np.array([5.0, 0.0, 20.0, 0.0, 0.1, 2.0])
    fit = RecursiveLeastSquares(list(prior), list(variances), forgetting=forgetting)
    information, believed = np.diag(1 / variances), prior
    for _ in range(300):
        features = np.array(a_step(random_))
        target = float(features @ TRUE) + random_.gauss(0, 0.1)
        kept = forgetting * information + (1 - forgetting) * np.diag(1 / variances)
        information = kept + np.outer(features, features)
        believed = np.linalg.solve(information, kept @ believed + features * target)
        fit.observe(tuple(features), target)
    assert fit.weights == pytest.approx(list(believed), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_that_has_seen_many_thousands_is_as_good_as_one_that_saw_some_hundreds(seed: int) -> None:
    random_ = random.Random(seed)
    fit = RelativeFit([weight * random_.uniform(0.5, 2.0) for weight in TRUE], forgetting=0.995)
    worst = 0.0
    for at in range(20_000):
        features = a_step(random_)
        if not any(features):
            continue
        usual = float(np.dot(features, TRUE))
        measured = usual * (1 + random_.gauss(0, 0.01))
        if at > 1_000:
            worst = max(worst, abs(fit.predict(features) / usual - 1))
        fit.observe(features, measured)
    assert worst < 0.1


def test_what_was_seen_is_forgotten_though_another_input_is_never_seen() -> None:
    fit = RelativeFit([10.0, 10.0], forgetting=0.99)
    for _ in range(2_000):
        fit.observe((1.0, 0.0), 10.0)
    for _ in range(300):
        fit.observe((1.0, 0.0), 20.0)
    assert fit.predict((1.0, 0.0)) == pytest.approx(20.0, rel=0.1)
    assert fit.weights[1] == 10.0


def test_inputs_that_never_change_leave_the_doubt_as_it_was_at_first() -> None:
    """They say nothing about what each weight is; a single other one must not be believed more than at the beginning."""
    long, short = (RecursiveLeastSquares([1.0, 1.0], [4.0, 4.0], forgetting=0.99) for _ in range(2))
    for _ in range(50_000):
        long.observe((1.0, 1.0), 2.0)
    for _ in range(500):
        short.observe((1.0, 1.0), 2.0)
    for fit in (long, short):
        fit.observe((1.0, 2.0), 6.0)
    assert long.weights == pytest.approx(short.weights, abs=0.02)
    assert all(abs(weight - 1.0) < 10 for weight in long.weights)
