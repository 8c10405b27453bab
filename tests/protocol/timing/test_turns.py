"""Which prompts are computed first: beside every possible order of a few."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.timing.turns import LONG_S, Turn, arrange, long_overdue

NOW = 100.0


def num_in_time(turns: list[Turn], order: list[int]) -> int:
    """One after another from NOW on."""
    ends_s, found = NOW, 0
    for index in order:
        ends_s += turns[index].left_s
        found += ends_s <= turns[index].due_s
    return found


halves = st.integers(1, 12).map(lambda half: half / 2)  # exact as floats
waiting = st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 30), halves), min_size=1, max_size=6).map(
    lambda rows: [Turn((place, number), NOW + due / 2, left_s) for number, (place, due, left_s) in enumerate(rows)]
)


@given(waiting)
@settings(max_examples=150)
def test_as_many_are_in_time_as_in_the_best_of_all_orders(turns: list[Turn]) -> None:
    order, num = arrange(turns, NOW)
    assert sorted(order) == list(range(len(turns)))
    best = max(num_in_time(turns, list(one)) for one in permutations(range(len(turns))))
    assert num == best == num_in_time(turns, order[:num]), "and all of those in front are in time"


@given(waiting)
def test_those_that_will_be_late_come_last_by_their_places(turns: list[Turn]) -> None:
    order, num = arrange(turns, NOW)
    places = [turns[index].place for index in order[num:]]
    assert places == sorted(places)


@given(st.lists(st.tuples(st.integers(0, 9), halves), min_size=1, max_size=8))
def test_without_a_moment_they_are_due_at_the_places_say_who_is_first(rows: list[tuple[int, float]]) -> None:
    turns = [Turn((place, number), math.inf, left_s) for number, (place, left_s) in enumerate(rows)]
    assert arrange(turns, NOW).order[0] == min(range(len(turns)), key=lambda index: turns[index].place)


def test_the_first_place_goes_before_what_is_due_sooner_only_where_that_can_wait() -> None:
    soon, short = Turn((5, 0), NOW + 4.0, 2.0), Turn((1, 1), NOW + 20.0, 1.0)
    assert arrange([soon, short], NOW).order == [1, 0]
    assert arrange([soon._replace(due_s=NOW + 2.5), short], NOW).order == [0, 1]


def test_who_is_left_out_is_the_least_urgent_before_the_longest() -> None:
    long, short = Turn((0, 0), NOW + 5.0, 4.0), Turn((0, 1), NOW + 5.0, 2.0)
    assert arrange([long, short], NOW) == ([1, 0], 1)
    assert arrange([long._replace(priority=-1), short], NOW) == ([0, 1], 1)
    several = [Turn((0, number), NOW + 6.0, 2.0, priority=1) for number in range(3)]
    assert arrange([*several, Turn((0, 3), NOW + 6.0, 5.0)], NOW).order[:1] == [3], "two of them leave no room for it"


@pytest.mark.parametrize(("overdue_s", "found"), [(LONG_S + 1, [0]), (LONG_S - 1, [])])
def test_only_who_is_late_for_long_is_overdue(overdue_s: float, found: list[int]) -> None:
    turns = [Turn((0, 0), NOW - overdue_s, 1.0), Turn((1, 1), NOW + 9.0, 1.0)]
    assert long_overdue(turns, arrange(turns, NOW), NOW) == found
