"""Loads that are made: what they are told is what they have; and the grid's baselines."""

from __future__ import annotations

import numpy as np
import pytest

from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.grid import Judge
from halfmoon.simulator.loads import Load, shift
from halfmoon.simulator.replay import ReplayOptions
from halfmoon.simulator.scenario import Scenario


@pytest.mark.parametrize("burst", [0.5, 1.0, 3.0])
def test_a_load_has_the_rate_the_lengths_and_the_bursts_that_it_was_told(burst: float) -> None:
    requests = Load("any", 800, 200, spread=0.7, burst=burst).make(8000, rate=5.0, seed=3).requests
    gaps = np.diff([request.arrival_s for request in requests])
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burst, rel=0.15)
    inputs = np.array([request.num_input_tokens for request in requests])
    assert inputs.mean() == pytest.approx(800, rel=0.05) and inputs.std() / inputs.mean() == pytest.approx(0.7, rel=0.1)
    blocks = [block for request in requests for block in request.block_ids]
    assert len(blocks) == len(set(blocks)), "nothing is shared"


def test_a_shift_is_one_load_and_then_the_other() -> None:
    first, second = (Load(name, 100, length).make(50, seed=1) for name, length in (("short", 10), ("long", 1000)))
    both = shift(first, second).requests
    arrivals = [request.arrival_s for request in both]
    assert arrivals == sorted(arrivals) and both[:50] == first.requests
    assert {block for one in both[:50] for block in one.block_ids}.isdisjoint(block for one in both[50:] for block in one.block_ids)


def test_what_is_no_load_is_told() -> None:
    with pytest.raises(ConfigError, match="spread at least 0"):
        Load("any", 100, 10, spread=-1.0)
    with pytest.raises(ConfigError, match="at a rate above 0"):
        Load("any", 100, 10).make(10, rate=0.0)


def test_the_best_split_is_the_one_that_a_search_of_each_finds(small_cost: CostModel) -> None:
    trace = Load("prompts", 500, 20).make(80, seed=2)
    base = Scenario(cost=small_cost, num_prefill=1, num_decode=2, slo=Slo(2.0, 0.05))
    judge = Judge(base, trace, ReplayOptions(), tolerance=0.1)
    found, form = judge.best_split(1.0)
    each = {number: judge.search.search(base.with_(num_prefill=number, num_decode=3 - number), 1.0).speed for number in (1, 2)}
    assert form == "2P1D" and each[2] > each[1]
    assert found.speed == pytest.approx(each[2], rel=0.1)
