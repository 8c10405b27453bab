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


def test_every_request_gets_all_its_tokens_in_order_and_not_before_its_work_is_done(bench: Any) -> None:
    for one in bench.replay(requests(bench, 30, 0.3), 0.02, 5.0, 120.0, 1):
        assert one.num_computed == one.num_tokens and one.num_given == one.num_output_tokens - 1
        assert one.arrival_s + 0.8 * bench.work_s(one.num_tokens) < one.first_s <= one.last_s
        assert one.tpot_s < 1.15 * 0.02, "steps are sized for it"


def test_a_prompt_that_lets_others_pass_for_longer_waits_longer_and_the_median_less(bench: Any) -> None:
    def ttft(ageing: float) -> list[float]:
        done = bench.replay(requests(bench, 60, 0.3), 0.02, ageing, 120.0, 1)
        return sorted(one.first_s - one.arrival_s for one in done)

    patient, fcfs = ttft(20.0), ttft(0.0)
    assert patient[30] < 0.5 * fcfs[30] and patient[-1] > fcfs[-1]
