"""A worker's unfinished prefills in predicted seconds, most urgent first, in the order of its scheduler.

place ─► [ most urgent … least urgent ]
   the clock takes seconds off at the front ─┘  the worker's reports correct what the clock took
TaskTable holds the tasks of all workers, so that queues() gives at once what a new prefill would wait for on each worker. Those who are
due at a moment are not computed in the order of the books, but as the worker arranges them: queues() is near that, waiting() is for who
wants to arrange the tasks of one worker.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...protocol.timing.turns import Turn
from .assigned_load import AssignedLoad, Assignment
from .pool import Floats, Ints, Pool
from .rows import Rows

UNSEEN_S = 1e-6  # a smaller change is not written to the table


class QueuePlace(NamedTuple):
    """What a worker orders a prompt by."""

    queue_order: int  # lower is sooner
    due_s: float = math.inf  # its first token, of the clock of now_s; inf: its order alone counts, and those who are due come after it
    priority: int = 0  # lower is more urgent


ANYWHERE = QueuePlace(0)
BEHIND_ALL = QueuePlace(2**62, -math.inf)  # of a prompt that lets every other pass


class Waiting(NamedTuple):
    """A prefill that is not done."""

    turn: Turn  # seconds as if nobody decoded beside it
    num_tokens: float  # left


class Queues(NamedTuple):
    """Of prefills on each worker, by a place in its queue. [workers' rows] each."""

    ahead_s: Floats  # predicted, until the place is reached
    num_ahead_tokens: Floats
    behind_s: Floats
    num_behind_tokens: Floats

    def show(self, pool: Pool, rows: Ints, now_s: float) -> None:
        """Sets the pool's columns. rows: its workers'."""
        pool.busy_until_s = now_s + self.ahead_s[rows]
        pool.num_ahead_tokens, pool.num_behind_tokens = self.num_ahead_tokens[rows], self.num_behind_tokens[rows]
        pool.behind_s = self.behind_s[rows]


class TaskTable:
    """A row for each task. Two numbers give what is left of it at any moment; they hold until its worker's backlog changes."""

    def __init__(self) -> None:
        # worker's row, queue order, whether its worker shares steps, seconds left at the last change, when it ends by the clock, tokens a
        # second, when it is due, priority
        self._tasks: Rows[PrefillTask] = Rows(np.int64, np.int64, np.bool_, *[np.float64] * 4, np.int64)

    def __len__(self) -> int:
        return len(self._tasks)

    def put(self, task: PrefillTask, row: int, *, shares: bool) -> None:
        tokens_per_s = task.assignment.num_tokens / task.seconds if task.seconds > 0.0 else 0.0
        due_s, priority = task.place.due_s, task.place.priority
        self._tasks.put(task, row, task.order[0], shares, task.shown_left_s, task.shown_end_s, tokens_per_s, due_s, priority)

    def remove(self, task: PrefillTask) -> None:
        self._tasks.remove(task)

    @property
    def rows(self) -> Ints:
        """The workers' rows, one for each task."""
        return self._tasks.columns()[0]

    def queues(self, place: QueuePlace, work_s: Floats, now_s: float) -> Queues:
        """What each worker has to prefill before a prefill with this place ends there, and what comes after it. [workers' rows]

        Args:
            work_s: seconds of the prefill itself on each worker. [workers' rows]
        """
        rows, _, _, left_s, end_s, tokens_per_s, _, _ = self._tasks.columns()
        left_s = np.minimum(left_s, np.maximum(end_s - now_s, 0.0))
        before = self._by_order if place.due_s == math.inf else self._by_due
        ahead_s = before(place, left_s, work_s, now_s)
        behind_s = left_s - ahead_s
        found = (ahead_s, ahead_s * tokens_per_s, behind_s, behind_s * tokens_per_s)
        return Queues(*(_added(rows, one, len(work_s)) for one in found))

    def waiting(self, row: int, now_s: float) -> list[Waiting]:
        """Of one worker, in no order."""
        rows, orders, _, left_s, end_s, tokens_per_s, due_s, priorities = self._tasks.columns()
        found: list[Waiting] = []
        for at in np.flatnonzero(rows == row).tolist():
            seconds = min(float(left_s[at]), max(float(end_s[at]) - now_s, 0.0))
            turn = Turn((int(orders[at]), 0), float(due_s[at]), seconds, int(priorities[at]))
            found.append(Waiting(turn, seconds * float(tokens_per_s[at])))
        return found

    def _by_order(self, place: QueuePlace, left_s: Floats, work_s: Floats, now_s: float) -> Floats:
        """Seconds of each task that are before it. [tasks]

        More urgent prefills count in full. Prefills of the same order do so too, but where steps are shared each counts at most as much
        as the prefill itself. Those that are due at a moment come after it.
        """
        rows, orders, shares, _, _, _, due_s, _ = self._tasks.columns()
        equals = (orders == place.queue_order) & shares
        ahead_s = np.where(equals, np.minimum(left_s, work_s[rows]), left_s)
        ahead_s[(orders > place.queue_order) | (due_s < math.inf)] = 0.0
        return ahead_s

    def _by_due(self, place: QueuePlace, left_s: Floats, work_s: Floats, now_s: float) -> Floats:
        """The same of one that is due at a moment. [tasks]

        Before it is whoever is due at none; of those who can be in time whoever has a sooner place, as far as there is time until it is
        due. Where it can't be in time itself, all of those, and of the late ones whoever has a sooner place. Near what the worker will
        arrange: whom it leaves out for the sake of others is not looked at.
        """
        rows, orders, _, _, _, _, due_s, _ = self._tasks.columns()
        first, in_time, sooner = due_s == math.inf, due_s - now_s >= left_s, orders <= place.queue_order
        room_s = place.due_s - now_s - work_s
        late = _added(rows, np.where(first | (in_time & (due_s <= place.due_s)), left_s, 0.0), len(work_s)) > room_s
        ahead_s = np.where(first | np.where(late[rows], in_time | sooner, in_time & sooner), left_s, 0.0)
        all_s = _added(rows, ahead_s, len(work_s))
        return ahead_s * np.where(late, 1.0, np.minimum(room_s / np.maximum(all_s, UNSEEN_S), 1.0))[rows]


class Backlog:
    """
    Args:
        assigned: the tokens that the worker has yet to compute.
        shares: its scheduler divides a step among prompts of one order, as a prefill worker's does. Else the first prompt gets it all.
        table, row: where its tasks stand beside those of other workers.
    """

    def __init__(self, assigned: AssignedLoad, *, shares: bool, table: TaskTable, row: int) -> None:
        self.assigned = assigned
        self._shares = shares
        self._table = table
        self._row = row
        self._tasks: list[PrefillTask] = []  # by queue_order, then arrival
        self._numbers = itertools.count()
        self._now_s = 0.0  # the moment up to which the clock has taken seconds off

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def place(self, num_tokens: int, seconds: float, place: QueuePlace, now_s: float) -> PrefillTask:
        """seconds: predicted time for num_tokens. The caller ends the task when the prefill ends, in whatever way."""
        self._follow(now_s)
        task = PrefillTask(place, (place.queue_order, next(self._numbers)), seconds, self.assigned.place(num_tokens), self)
        at = bisect_right(self._tasks, task.order, key=_order)
        self._tasks.insert(at, task)
        self._publish(at)
        return task

    def report(self, now_s: float) -> None:
        """The worker has reported how many tokens it has left."""
        if not self._tasks:
            return
        self._follow(now_s)
        left = sum(task.left * task.assignment.num_tokens for task in self._tasks)
        surplus = left - self.assigned.num_left_tokens
        for task in self._tasks:
            num_tokens = task.assignment.num_tokens
            if num_tokens and surplus:
                # tokens that are done come off the most urgent tasks, tokens that are not go back onto them
                part = min(max(surplus / num_tokens, task.left - 1.0), task.left)
                task.left -= part
                surplus -= part * num_tokens
        self._publish()

    def share(self, shares: bool) -> None:
        """From now on its scheduler divides steps, or does not."""
        if shares != self._shares:
            self._shares = shares
            for task in self._tasks:
                self._table.put(task, self._row, shares=shares)

    def leave_table(self) -> None:
        """The worker is gone. Nobody waits for its tasks any more, and its row belongs to another."""
        for task in self._tasks:
            self._table.remove(task)
        self._table = TaskTable()

    def _follow(self, now_s: float) -> None:
        elapsed_s = now_s - self._now_s
        self._now_s = now_s
        for task in self._tasks:
            if elapsed_s <= 0.0:
                return
            left_s = task.left * task.seconds
            if left_s <= elapsed_s:
                task.left = 0.0
            else:
                task.left -= elapsed_s / task.seconds
            elapsed_s -= left_s

    def end(self, task: PrefillTask, now_s: float) -> None:
        """For PrefillTask alone."""
        self._follow(now_s)
        at = self._tasks.index(task)
        del self._tasks[at]
        self._table.remove(task)
        self._publish(at)

    def _publish(self, first: int = 0) -> None:
        """Writes the tasks from index first on to the table, as running one after another from now on.

        Nothing before first has changed. The table already accounts for what only the clock took.
        """
        end_s = max(self._now_s, self._tasks[first - 1].shown_end_s) if first else self._now_s
        for task in islice(self._tasks, first, None):
            left_s = task.left * task.seconds
            end_s += left_s
            if abs(end_s - task.shown_end_s) > UNSEEN_S or (task is not self._tasks[0] and abs(left_s - task.shown_left_s) > UNSEEN_S):
                task.shown_end_s, task.shown_left_s = end_s, left_s
                self._table.put(task, self._row, shares=self._shares)


@dataclass(slots=True, eq=False)
class PrefillTask:
    place: QueuePlace
    order: tuple[int, int]  # queue_order, arrival
    seconds: float
    assignment: Assignment
    backlog: Backlog
    left: float = 1.0  # the share not done yet, by clock and reports
    shown_left_s: float = math.inf  # as written in the table
    shown_end_s: float = math.inf

    def end(self, now_s: float) -> None:
        """It is done, or was aborted. Further calls do nothing."""
        if not self.assignment.ended:
            self.assignment.end()
            self.backlog.end(self, now_s)


def _added(rows: Ints, values: Floats, num_rows: int) -> Floats:
    """By row. [num_rows]"""
    return np.asarray(np.bincount(rows, values, num_rows), np.float64)


def _order(task: PrefillTask) -> tuple[int, int]:
    return task.order
