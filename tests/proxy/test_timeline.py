"""proxy/timeline.py, compared with every value kept."""

from __future__ import annotations

import math
import random

from halfmoon.proxy.timeline import BIN_S, EMPTY, NUM_BINS, RATIO, Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * BIN_S

    def __call__(self) -> float:
        return self.now


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def test_the_percentiles_of_each_bin_are_those_of_its_values() -> None:
    clock, rng = Clock(), random.Random(5)
    timeline, kept = Timeline(clock), []
    for _ in range(3):
        values = [rng.lognormvariate(-2, 1.5) for _ in range(501)]
        for value in values:
            timeline.first_token(value)
            timeline.finished(value / 10)
        kept.append(values)
        clock.now += BIN_S
    for values, row in zip(kept, timeline.rows()[-4:-1], strict=True):
        shares = ((row.ttft_p50, 0.5, 1.0), (row.ttft_p99, 0.99, 1.0), (row.tpot_p50, 0.5, 0.1), (row.tpot_p99, 0.99, 0.1))
        for found, share, factor in shares:
            expected = nearest_rank(values, share) * factor
            assert found is not None and abs(math.log(found / expected)) <= math.log(RATIO) / 2 + 1e-9


def test_a_bin_in_which_nothing_ended_stays_empty() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.ended("yes")
    clock.now += 3 * BIN_S
    timeline.ended("no")
    timeline.ended("unknown")
    assert [(row.num_in_slo, row.num_missed) for row in timeline.rows()[-4:]] == [(1, 0), (0, 0), (0, 0), (0, 1)]
    assert timeline.rows()[-2] == EMPTY


def test_what_is_older_than_the_window_is_forgotten_however_long_nobody_looked() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.first_token(0.1)
    assert timeline.rows()[-1] != EMPTY
    clock.now += 10**6 * BIN_S
    assert timeline.rows() == [EMPTY] * NUM_BINS


def test_it_has_one_size_whatever_comes() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for number in range(3 * NUM_BINS):
        for value in (0.0, 1e-9, 0.2 * number, 1e12):
            timeline.first_token(value)
        clock.now += BIN_S
    assert len(timeline.rows()) == NUM_BINS and all(row.ttft_p99 is not None for row in timeline.rows()[:-1])
