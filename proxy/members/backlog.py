"""The prefills that a worker was given and has not finished, in predicted seconds, most urgent first, as its scheduler has them.

place ─► [ most urgent … least urgent ]          ahead_s: what a new one of some priority waits for
   the clock takes off at the front ─┘  a report of the worker's own count puts right what the clock took
"""

from __future__ import annotations

import itertools
from bisect import insort
from dataclasses import dataclass

from .assigned_load import AssignedLoad, Assignment


class Backlog:
    """Args:
    assigned: of the tokens that the worker has yet to compute.
    shares: whether its scheduler divides a step among those of one priority (a prefill worker's does), else the first has it all.
    """

    def __init__(self, assigned: AssignedLoad, *, shares: bool) -> None:
        self.assigned = assigned
        self.shares = shares
        self._tasks: list[PrefillTask] = []  # by queue_order, then arrival
        self._numbers = itertools.count()
        self._now_s = 0.0  # to which the clock has been followed

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def place(self, num_tokens: int, seconds: float, queue_order: int, now_s: float) -> PrefillTask:
        """num_tokens to compute, in so many seconds of the worker's, by prediction. To be ended when the prefill is, however."""
        self._follow(now_s)
        task = PrefillTask((queue_order, next(self._numbers)), seconds, self.assigned.place(num_tokens), self)
        insort(self._tasks, task, key=_order)
        return task

    def report(self, now_s: float) -> None:
        """The worker has told how many tokens it has left."""
        if not self._tasks:
            return
        self._follow(now_s)
        left = sum(task.left * task.assignment.num_tokens for task in self._tasks)
        surplus = left - self.assigned.num_left_tokens
        for task in self._tasks:
            num_tokens = task.assignment.num_tokens
            if num_tokens and surplus:
                # done tokens go off the most urgent, undone ones back on them
                part = min(max(surplus / num_tokens, task.left - 1.0), task.left)
                task.left -= part
                surplus -= part * num_tokens

    def ahead_s(self, queue_order: int, work_s: float, now_s: float) -> float:
        """Predicted seconds from now in which the worker computes others before a prefill of work_s with this priority ends.

        All of the more urgent ones. Of its equals all, or where steps are shared as much as of itself.
        """
        self._follow(now_s)
        found = 0.0
        for task in self._tasks:
            if task.order[0] > queue_order:
                break
            left_s = task.left * task.seconds
            found += min(left_s, work_s) if self.shares and task.order[0] == queue_order else left_s
        return found

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

    def _end(self, task: PrefillTask) -> None:
        self._tasks.remove(task)


@dataclass(slots=True, eq=False)
class PrefillTask:
    order: tuple[int, int]  # queue_order, arrival
    seconds: float
    assignment: Assignment
    backlog: Backlog
    left: float = 1.0  # of it, as far as clock and reports tell

    def end(self) -> None:
        """Done or given up. Once; further calls change nothing."""
        if not self.assignment.ended:
            self.assignment.end()
            self.backlog._end(self)


def _order(task: PrefillTask) -> tuple[int, int]:
    return task.order
