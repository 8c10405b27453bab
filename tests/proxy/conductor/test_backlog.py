"""The backlog of prefills against plain sums of what is left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.assigned_load import AssignedLoad
from halfmoon.proxy.conductor.backlog import BEHIND_ALL, Backlog, PrefillTask, QueuePlace, TaskTable

NEVER_LATER = 0.0  # no time passes


def backlog(shares: bool = True) -> Backlog:
    return Backlog(AssignedLoad(), shares=shares, table=TaskTable(), row=0)


def ahead_s(found: Backlog, queue_order: int, work_s: float, now_s: float) -> float:
    return float(found._table.queues(QueuePlace(queue_order), np.array([work_s]), now_s).ahead_s[0])


def test_a_request_waits_for_the_more_urgent_and_for_as_much_of_its_equals_as_it_needs_itself() -> None:
    found = backlog()
    for seconds, priority in ((4.0, 5), (1.0, 5), (10.0, 9), (2.0, 1)):
        found.place(100, seconds, QueuePlace(priority), NEVER_LATER)
    assert ahead_s(found, 5, 3.0, NEVER_LATER) == pytest.approx(2.0 + 3.0 + 1.0), (
        "a step is shared: the long equal takes no more than it does"
    )
    assert ahead_s(found, 5, 9.0, NEVER_LATER) == pytest.approx(2.0 + 4.0 + 1.0)
    assert ahead_s(found, 0, 9.0, NEVER_LATER) == 0.0, "nobody is before the most urgent"
    assert ahead_s(found, 99, 0.1, NEVER_LATER) == pytest.approx(17.0)


def test_where_steps_are_not_shared_all_the_equals_come_before() -> None:
    found = backlog(shares=False)
    found.place(100, 4.0, QueuePlace(5), NEVER_LATER)
    assert ahead_s(found, 5, 0.5, NEVER_LATER) == 4.0


def test_the_clock_takes_from_the_most_urgent_first() -> None:
    found = backlog()
    found.place(100, 4.0, QueuePlace(7), 10.0)
    found.place(100, 2.0, QueuePlace(3), 10.0)
    assert ahead_s(found, 3, 9.0, 11.0) == pytest.approx(1.0)
    assert ahead_s(found, 7, 9.0, 13.0) == pytest.approx(3.0)
    assert ahead_s(found, 7, 9.0, 30.0) == 0.0


def test_a_report_puts_right_what_the_clock_took() -> None:
    found = backlog()
    found.assigned.report(0)
    found.place(1000, 4.0, QueuePlace(7), 10.0)
    found.assigned.report(0)
    found.assigned.report(800)  # two reports on: it is believed
    found.report(13.0)
    assert ahead_s(found, 7, 9.0, 13.0) == pytest.approx(4.0 * 0.8), "slower than predicted"
    found.assigned.report(100)
    found.report(13.1)
    assert ahead_s(found, 7, 9.0, 13.1) == pytest.approx(4.0 * 0.1), "and then faster"


def test_what_has_ended_is_before_nobody() -> None:
    found = backlog()
    first, second = found.place(10, 1.0, QueuePlace(0), 0.0), found.place(20, 2.0, QueuePlace(0), 0.0)
    first.end(0.0)
    first.end(0.0)
    assert ahead_s(found, 0, 9.0, 0.0) == 2.0 and found.assigned.num_tokens == 20
    second.end(0.0)
    assert not found and found.assigned.num_tokens == 0


def test_who_is_due_waits_for_those_in_time_whose_place_is_sooner_and_who_will_be_late_for_all_of_them() -> None:
    found = backlog(shares=False)
    found.place(100, 2.0, QueuePlace(0, due_s=0.5), NEVER_LATER)  # late in any case
    found.place(100, 1.0, QueuePlace(1, due_s=8.0), NEVER_LATER)
    found.place(100, 1.0, QueuePlace(9, due_s=3.5), NEVER_LATER)

    def ahead(place: QueuePlace) -> float:
        return float(found._table.queues(place, np.array([1.0]), NEVER_LATER).ahead_s[0])

    assert ahead(QueuePlace(5, due_s=6.0)) == pytest.approx(1.0), "not for the one that is due sooner: it has time"
    assert ahead(QueuePlace(5, due_s=1.5)) == pytest.approx(0.5), "and for no longer than it has time itself"
    assert ahead(QueuePlace(5, due_s=0.9)) == pytest.approx(4.0)
    found.place(100, 1.5, QueuePlace(9), NEVER_LATER)
    assert ahead(QueuePlace(5, due_s=6.0)) == pytest.approx(2.5), "who is due at no moment goes before all who are"
    assert ahead(QueuePlace(9)) == pytest.approx(1.5) and ahead(BEHIND_ALL) == pytest.approx(5.5)


Act = tuple[str, int, int]


@given(st.lists(st.tuples(st.sampled_from(["place", "end", "report", "pass"]), st.integers(0, 60), st.integers(0, 3)), max_size=50))
def test_no_history_makes_less_than_nothing_left_or_more_than_was_placed(acts: list[Act]) -> None:
    found, now_s = backlog(shares=False), 0.0
    tasks: list[PrefillTask] = []
    for act, number, priority in acts:
        if act == "place":
            tasks.append(found.place(number, number / 10, QueuePlace(priority), now_s))
        elif act == "end" and tasks:
            tasks.pop(number % len(tasks)).end(now_s)
        elif act == "report":
            found.assigned.report(number)
            found.report(now_s)
            left = sum(task.left * task.assignment.num_tokens for task in tasks)
            assert left == pytest.approx(found.assigned.num_left_tokens, abs=1e-6), "after a report the two agree"
        else:
            now_s += number / 50
        urgent = [ahead_s(found, limit, 1e9, now_s) for limit in range(4)]
        assert urgent == sorted(urgent) and urgent[0] >= 0.0
        for limit, waits_s in enumerate(urgent):
            assert waits_s <= sum(task.seconds for task in tasks if task.order[0] <= limit) + 1e-9


@given(st.lists(st.tuples(st.sampled_from(["place", "end", "report", "pass"]), st.integers(0, 60), st.integers(0, 3)), max_size=60))
def test_the_table_tells_of_every_worker_what_its_own_tasks_add_up_to(acts: list[Act]) -> None:
    table, now_s = TaskTable(), 0.0
    workers = [Backlog(AssignedLoad(), shares=row != 1, table=table, row=row) for row in range(3)]
    tasks: list[PrefillTask] = []
    for act, number, priority in acts:
        worker = workers[number % 3]
        if act == "place":
            tasks.append(worker.place(number, number / 10, QueuePlace(priority), now_s))
        elif act == "end" and tasks:
            tasks.pop(number % len(tasks)).end(now_s)
        elif act == "report":
            worker.assigned.report(number)
            worker.report(now_s)
        else:
            now_s += number / 50
        work_s = np.array([0.3, 0.3, 2.0])
        for order in range(4):
            found = table.queues(QueuePlace(order), work_s, now_s).ahead_s
            for row, one in enumerate(workers):
                one._follow(now_s)
                left = [(task.order[0], task.left * task.seconds) for task in one._tasks]
                expected = sum(
                    min(left_s, work_s[row]) if other == order and row != 1 else left_s for other, left_s in left if other <= order
                )
                assert found[row] == pytest.approx(expected, abs=1e-4)
    assert len(table) == len(tasks)


def test_a_worker_that_left_is_before_nobody_on_the_row_that_another_has_now() -> None:
    table = TaskTable()
    gone = Backlog(AssignedLoad(), shares=True, table=table, row=0)
    task = gone.place(100, 4.0, QueuePlace(0), 0.0)
    gone.leave_table()
    Backlog(AssignedLoad(), shares=True, table=table, row=0).place(10, 1.0, QueuePlace(0), 0.0)
    task.end(0.5)
    gone.place(100, 9.0, QueuePlace(0), 0.5)
    assert table.queues(QueuePlace(0), np.array([9.0]), 0.5).ahead_s[0] == pytest.approx(0.5)


def test_what_ended_on_time_has_taken_nothing_from_those_behind_it() -> None:
    found = backlog()
    first = found.place(100, 4.0, QueuePlace(0), 10.0)
    found.place(100, 3.0, QueuePlace(0), 10.0)
    first.end(14.0)
    assert ahead_s(found, 0, 9.0, 14.0) == pytest.approx(3.0)
    assert ahead_s(found, 0, 9.0, 15.0) == pytest.approx(2.0)
