"""What the decode pool has before it, by hand."""

from __future__ import annotations

import pytest

from halfmoon.proxy.conductor.load_tracker import LoadTracker
from halfmoon.proxy.conductor.placement import Arriving, MemberState
from halfmoon.proxy.conductor.predictors import Predictors


def arriving(load_tracker: LoadTracker) -> set[Arriving]:
    return {Arriving(*row) for row in zip(*(column.tolist() for column in load_tracker.arriving), strict=True)}


def test_a_request_arrives_then_runs_then_is_gone_and_only_a_finished_one_says_how_long_decodes_last() -> None:
    load_tracker = LoadTracker()
    load_tracker.placed("a", 5.0, 100)
    load_tracker.placed("b", 7.0, 50)
    assert arriving(load_tracker) == {Arriving(5.0, 100), Arriving(7.0, 50)} and load_tracker.began_s.tolist() == []
    load_tracker.began("a", 5.5)
    assert arriving(load_tracker) == {Arriving(7.0, 50)} and load_tracker.began_s.tolist() == [5.5]
    assert load_tracker.finished("a", 9.5) == 4.0 and load_tracker.finished("a", 9.6) is None
    load_tracker.began("b", 8.0)
    load_tracker.left("b")
    load_tracker.left("b")
    assert (arriving(load_tracker), load_tracker.began_s.tolist()) == (set(), []) and load_tracker.is_idle
    assert load_tracker.decode_s(100.0) == 4.0


def test_a_batch_has_room_when_enough_of_it_has_left_at_the_rate_at_which_decodes_end() -> None:
    predictors = Predictors.guess()
    step = predictors.step
    member = MemberState("d", "d.1", "s", num_running=20, num_running_tokens=20_000)
    load_tracker = LoadTracker()
    for number in range(10):
        load_tracker.placed(number, 0.0, 10)
        load_tracker.began(number, 0.0)
        load_tracker.finished(number, 30.0)
    step_s = step.predict(21, 21_000)
    each_s = step.predict(1, 1000) - step.predict(0, 0)
    # 20 of 30 s each: one leaves every 1.5 s, and five have to
    assert load_tracker.fits_in_s(step, member, step_s, step_s - 4.5 * each_s, 99.0) == pytest.approx(7.5)
    assert load_tracker.fits_in_s(step, member, step_s, 0.0, 99.0) == pytest.approx(30.0), "never mind how few: all of them have left then"
    assert load_tracker.fits_in_s(step, MemberState("d", "d.1", "s"), step_s, 0.0, 99.0) == pytest.approx(30.0)
