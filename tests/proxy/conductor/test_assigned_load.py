"""The proxy's assigned load against a plain model of what was placed and what the worker reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.assigned_load import AssignedLoad, Assignment


def test_what_is_placed_counts_until_it_ends() -> None:
    load = AssignedLoad()
    first, second = load.place(100), load.place(20)
    assert load.num_tokens == 120
    second.grow(3)
    assert load.num_tokens == 123
    first.end()
    first.end()
    first.grow(50)
    assert load.num_tokens == 23
    second.end()
    assert load.num_tokens == 0


def test_a_prompt_counts_down_as_its_worker_reports() -> None:
    load = AssignedLoad()
    load.report(0)
    load.place(1000)
    assert load.num_left_tokens == 1000, "the last report knew nothing of it"
    load.report(0)
    assert load.num_left_tokens == 1000, "that report may have been on its way already"
    load.report(600)
    assert load.num_left_tokens == 600
    load.place(50)
    assert load.num_left_tokens == 650
    load.report(0)
    load.report(0)
    assert load.num_left_tokens == 0


def test_a_worker_that_never_reported_counts_in_full() -> None:
    load = AssignedLoad()
    load.place(1000)
    assert load.num_left_tokens == 1000


Step = tuple[str, int]


@given(st.lists(st.tuples(st.sampled_from(["place", "end", "grow", "report"]), st.integers(0, 50)), max_size=60))
def test_the_sums_hold_through_any_history(steps: list[Step]) -> None:
    load = AssignedLoad()
    assignments: list[tuple[Assignment, list[int]]] = []  # assignment, [tokens, number of reports when placed]
    num_reports, reported = 0, 0
    for action, number in steps:
        if action == "place":
            assignments.append((load.place(number), [number, num_reports]))
        elif action == "report":
            load.report(number)
            num_reports, reported = num_reports + 1, number
        elif assignments:
            assignment, model = assignments[number % len(assignments)]
            if action == "end":
                assignment.end()
                assignments.remove((assignment, model))
            else:
                assignment.grow(number)
                model[0] += number
        placed = sum(model[0] for _, model in assignments)
        unseen = sum(model[0] for _, model in assignments if num_reports - model[1] <= 1)
        assert load.num_tokens == placed
        assert load.num_left_tokens == (placed if num_reports == 0 else min(placed, reported + unseen))
