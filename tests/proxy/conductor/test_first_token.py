"""A first token as it is predicted, against steps worked out by hand and against what comes of it on a small load."""

from __future__ import annotations

import numpy as np
import pytest

from halfmoon.protocol.timing.step_limits import StepLimits
from halfmoon.proxy.conductor.placement import MemberState
from halfmoon.proxy.conductor.predictors import CostModel, Predictors
from halfmoon.proxy.conductor.predictors.first_token import Prompt, wait_for
from halfmoon.proxy.conductor.predictors.passing import FEWEST, Passing
from halfmoon.proxy.conductor.predictors.promise import FEWEST as FEWEST_SEEN
from halfmoon.proxy.conductor.predictors.promise import Promise

MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.02, per_sequence_s=1e-3, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip
NOBODY_PASSES = float("-inf")


def seconds(member: MemberState, num_new: int, tpot_s: float = 0.1) -> float:
    wait = wait_for(Predictors(MODEL), Prompt(num_new, 0, NOBODY_PASSES, tpot_s), member, 1, now_s=10.0)
    return wait.queue_s + wait.prefill_s


def member(*, ahead: int = 0, behind: int = 0, running: int = 0) -> MemberState:
    return MemberState("w", "w", "s", busy_until_s=10.0 + ahead / 1e3, num_running=running, num_ahead_tokens=ahead,
                       num_behind_tokens=behind, behind_s=behind / 1e3,
                       limits=StepLimits(1000, 1000))  # fmt: skip


def test_alone_a_prompt_takes_its_own_seconds() -> None:
    assert seconds(member(), 300) == pytest.approx(0.3)
    assert seconds(member(ahead=500), 300) == pytest.approx(0.8)


def test_a_token_comes_out_at_the_end_of_a_step_that_others_fill() -> None:
    # a step of 1,000 tokens: 500 before it, its 300, and 200 of those behind it
    assert seconds(member(ahead=500, behind=5000), 300) == pytest.approx(1.0)
    # nobody is before it: the step under way, which it is not in, has 1,000 tokens of the others, and so has its own
    assert seconds(member(behind=5000), 300) == pytest.approx(2.0)


def test_beside_decode_tokens_a_prompt_comes_in_chunks_that_the_batch_leaves_room_for() -> None:
    # 96 ms for a step of 10 decode tokens, which take 10 ms: chunks of 64 tokens take 64 + 10 ms, and 128 would be too many.
    # The step under way has decode tokens alone (20 + 10 ms); then 4 chunks and a last one of 44
    assert seconds(member(running=10), 300) == pytest.approx(0.030 + 4 * 0.074 + 0.054)


def test_what_is_more_urgent_and_comes_later_counts_as_it_came_of_late() -> None:
    passing = Passing()
    for number in range(2 * FEWEST):
        passing.observe(number * 0.1, 0.06, 60.0, 0.3)  # 10 a second, 60 ms each: the one worker is busy for 6 of 10 s
    now_s = 2 * FEWEST * 0.1
    found = passing.within(1.0, 0.8, now_s, 1)
    assert found.seconds == pytest.approx(0.5 * 10 * 0.06), "those that come within 0.5 s: later ones have a later place"
    assert found.num_tokens + found.num_behind_tokens == pytest.approx(10 * 60.0)
    assert passing.within(1.0, 0.8, now_s, 4).seconds < found.seconds / 4, "they go to others that have nothing to do"
    assert passing.within(1.0, NOBODY_PASSES, now_s, 1).seconds == 0.0


def test_of_those_that_come_nobody_makes_a_short_prompt_late_and_all_pass_a_long_one_that_has_no_time_for_them() -> None:
    predictors = Predictors(MODEL)
    for number in range(2 * FEWEST):
        predictors.passing.observe(number * 0.1, 0.15, 150.0, 0.0)  # 10 a second, 150 ms each: one worker is too few
    now_s, limits = 2 * FEWEST * 0.1, StepLimits(100, 100)
    queue = MemberState("w", "w", "s", busy_until_s=now_s + 1.0, num_ahead_tokens=1000, limits=limits)

    def first_token_s(num_new: int, due_in_s: float) -> float:
        wait = wait_for(predictors, Prompt(num_new, 0, 5.0, 0.1, due_in_s), queue, 1, now_s)
        return wait.queue_s + wait.prefill_s

    undue_s = first_token_s(100, 100.0)
    assert undue_s > 2.0, "more comes than can be computed"
    assert first_token_s(100, 1.7) == pytest.approx(1.7, abs=0.11), "as late as it may be"
    assert first_token_s(100, 0.5) == pytest.approx(first_token_s(100, 1.1), abs=0.11), "or at once where it has no time"
    assert first_token_s(300, 1.7) > undue_s, "of too many the longest are left out"


def test_what_is_promised_is_what_nine_of_ten_came_within() -> None:
    promise = Promise()
    assert promise.factor(0.5) == 1.0
    for number in range(FEWEST_SEEN):
        promise.observe(0.5, 1.0, 1.0 + number / 100)
    expected = float(np.quantile(1.0 + np.arange(FEWEST_SEEN) / 100, 0.9))
    assert promise.factor(0.5) == pytest.approx(expected)
    assert promise.factor(0.0) == pytest.approx(expected), "of its kind none was seen: as of all"
    frozen = promise.frozen()
    for _ in range(100):
        promise.observe(0.5, 1.0, 2.0)
    assert promise.factor(0.5) == pytest.approx(2.0) and frozen.factor(0.5) == pytest.approx(expected)
