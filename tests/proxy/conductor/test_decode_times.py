from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.admission.decode_times import NUM_ENOUGH, NUM_SEEN, DecodeTimes


def test_who_is_old_may_stay_and_what_was_long_ago_is_forgotten() -> None:
    times = DecodeTimes()
    for _ in range(300):
        for seconds in (5.0, 20.0, 30.0):
            times.observe(seconds, 100)
    assert times.lasting(0.0, 10.0) == pytest.approx(2 / 3, abs=0.01)
    assert times.lasting(10.0, 5.0) == 1.0
    assert times.lasting(10.0, 15.0) == pytest.approx(1 / 2, abs=0.01)
    assert 0.0 < times.lasting(40.0, 1.0) < 1.0
    for _ in range(500):
        times.observe(2.0, 100)
    assert times.lasting(0.0, 3.0) == 0.0


def test_before_enough_have_ended_a_uniform_time_is_assumed() -> None:
    times = DecodeTimes(10.0)
    assert not times.known and times.mean_s == times.median_s == times.expected_s(500) == 10.0
    assert (times.lasting(4.0, 5.0), times.lasting(4.0, 7.0)) == (1.0, 0.0)


def test_long_prompts_with_short_answers_are_told_from_short_ones_with_long_answers() -> None:
    times, rng = DecodeTimes(), random.Random(0)
    for _ in range(400):
        times.observe(rng.uniform(0.0, 2.0), rng.randint(32_768, 65_535))
        times.observe(rng.uniform(10.0, 12.0), rng.randint(512, 1023))
    assert times.expected_s(40_000) == pytest.approx(1.0, abs=0.5)
    assert times.expected_s(600) == pytest.approx(11.0, abs=0.5)
    assert times.expected_s(5_000) == pytest.approx(6.0, abs=0.3), "nothing is known of that length: the mean of all"


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 10**6)), min_size=NUM_ENOUGH, max_size=NUM_SEEN + 50))
def test_mean_and_median_are_those_of_the_last_seen(seen: list[tuple[float, int]]) -> None:
    times = DecodeTimes()
    for seconds, num_tokens in seen:
        times.observe(seconds, num_tokens)
    last = [seconds for seconds, _ in seen[-NUM_SEEN:]]
    assert times.mean_s == pytest.approx(statistics.fmean(last), abs=1e-6)
    assert times.median_s == statistics.median_high(last)
    assert times.lasting(0.0, 0.0) in (0.5, sum(one > 0.0 for one in last) / max(sum(one > 0.0 for one in last), 1))
    for length in (10, 1000):
        assert 0.0 <= times.expected_s(length) <= max(max(seconds for seconds, _ in seen), 1.0) + 1e-6
