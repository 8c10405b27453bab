"""tests/benchmarks/step_replay.py: a coupled worker's decisions over a cost model of a card."""

from __future__ import annotations

import random
from typing import Any

import pytest


@pytest.fixture
def bench(load: Any) -> Any:
    return load("step_replay")


def requests(bench: Any, num: int, gap_s: float) -> list[Any]:
    rng = random.Random(7)
    return [bench.Request(number * gap_s, rng.choice([500, 3_000, 20_000]), rng.randint(1, 60)) for number in range(num)]


@pytest.mark.parametrize("constant", [0, 512])
def test_every_request_gets_all_its_tokens_in_order_and_not_before_its_work_is_done(bench: Any, constant: int) -> None:
    slo = None if constant else bench.Slo(2.0, 0.02)
    for one in bench.replay(requests(bench, 30, 0.3), slo, constant, 1):
        assert one.num_computed == one.num_tokens and one.num_given == one.num_output_tokens - 1
        assert one.arrival_s + 0.8 * bench.work_s(one.num_tokens) < one.first_s <= one.last_s
        assert slo is None or one.tpot_s < 1.15 * slo.tpot_s, "steps are sized for it"


def test_more_are_in_time_for_the_slo_that_they_tell_than_first_come_first_served(bench: Any) -> None:
    def num_in_slo(slo: Any, constant: int) -> int:
        done = bench.replay(requests(bench, 60, 0.25), slo, constant, 1)
        return sum(one.first_s - one.arrival_s <= 1.0 and one.tpot_s <= 0.02 for one in done)

    told = num_in_slo(bench.Slo(1.0, 0.02), 0)
    assert told > 1.3 * max(num_in_slo(None, 512), num_in_slo(None, 2048)) and told > 30
