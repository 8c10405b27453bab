"""Arrival processes against their formulas, with fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest

from halfmoon.deploy.load.arrivals import unit_arrivals
from halfmoon.deploy.load.lengths import Lengths
from halfmoon.protocol.errors import ConfigError

NUM = 20_000


@pytest.mark.parametrize(("process", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)])
def test_gaps_have_the_mean_and_the_variation_of_their_process(process: str, burstiness: float, variation: float) -> None:
    gaps = np.diff(unit_arrivals(process, NUM, seed=3, burstiness=burstiness), prepend=0.0)
    assert gaps.min() >= 0
    # five standard errors of the mean
    assert gaps.mean() == pytest.approx(1.0, abs=5 * variation / NUM**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.06)


def test_poisson_arrivals_have_as_much_variance_as_mean_in_any_stretch() -> None:
    counts = np.bincount((unit_arrivals("poisson", NUM, seed=5) / 10).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.12)


def test_constant_arrivals_are_a_second_apart() -> None:
    assert unit_arrivals("constant", 4, seed=0).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_seed_gives_the_same_arrivals_and_another_others() -> None:
    assert (unit_arrivals("poisson", 50, seed=1) == unit_arrivals("poisson", 50, seed=1)).all()
    assert (unit_arrivals("poisson", 50, seed=1) != unit_arrivals("poisson", 50, seed=2)).all()


def test_wrong_processes_are_told() -> None:
    with pytest.raises(ConfigError, match="poisson"):
        unit_arrivals("pareto", 5, seed=0)
    with pytest.raises(ConfigError, match="above 0"):
        unit_arrivals("gamma", 5, seed=0, burstiness=0.0)


def test_lengths_have_the_spread_that_was_asked_for() -> None:
    rng = np.random.default_rng(4)
    assert set(Lengths.parse("512").draw(9, rng, 10_000)) == {512}
    uniform = Lengths.parse("uniform:100:300").draw(NUM, rng, 10_000)
    assert (uniform.min(), uniform.max()) == (100, 300) and uniform.mean() == pytest.approx(200, rel=0.01)
    logs = np.log(Lengths.parse("lognormal:800:0.5").draw(NUM, rng, 10**9))
    assert logs.mean() == pytest.approx(np.log(800), rel=0.005) and logs.std() == pytest.approx(0.5, rel=0.03)


def test_lengths_are_cut_at_the_cap_and_never_below_one() -> None:
    drawn = Lengths.parse("lognormal:4:3").draw(2000, np.random.default_rng(0), 100)
    assert (drawn.min(), drawn.max()) == (1, 100)


@pytest.mark.parametrize("text", ["", "many", "uniform:5", "uniform:9:3", "lognormal:8", "0", "normal:1:2", "uniform:nan:3"])
def test_what_is_no_length_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        Lengths.parse(text)
