"""Which of the prompts that wait on a worker is computed next, so that as many as can be get their first token in time.

prompts that wait ─► the most that can be in time together ─► by when they are due; but the one whose place is the first goes before
                 │                                            those whom that makes late by nothing
                 └─► the others, behind those, by their places; those that wait for long have every eighth step

The most: in order of what is due, and whenever one would be late, the longest so far is left out (J. M. Moore, "An n job, one machine
sequencing algorithm for minimizing the number of late jobs", Management Science 15, 1968). It is asked anew as prompts come and go:
what is left out today may be in time tomorrow.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

LONG_S = 30.0  # overdue for so long, a prompt has a part of the steps
LONG_STEPS = 8  # of so many steps one
MOST_FOLLOWED = 32  # turns, one after another; those behind them are taken by their places
CAUTION = 1.3  # times what is predicted, that others must have to spare before one passes them


class Turn(NamedTuple):
    """A prompt that waits."""

    place: tuple[int, int]  # queue_order, arrival: lower is sooner
    due_s: float
    """Its first token, on the clock of now_s. inf: it is never late."""
    left_s: float
    """Seconds of the worker until it is computed, if nobody goes before it."""
    priority: int = 0
    """Lower is more urgent: the less urgent are left out first."""


class Arrangement(NamedTuple):
    order: list[int]
    """Indices of the turns, the next first."""
    num_in_time: int
    """Of those in front."""


def arrange(turns: Sequence[Turn], now_s: float) -> Arrangement:
    in_time, late = _most_in_time(turns, now_s)
    if (first := _first_without_harm(turns, in_time, now_s)) is not None:
        in_time.remove(first)
        in_time.insert(0, first)
    late.sort(key=lambda index: turns[index].place)
    return Arrangement(in_time + late, len(in_time))


class Before(NamedTuple):
    """What one of the turns waits for."""

    indices: list[int]
    in_time: bool
    """It is one of the most that can be in time together."""


def before(turns: Sequence[Turn], index: int, now_s: float) -> Before:
    """Whose turns come before that of one, if nobody else comes: arranged anew whenever a prompt is computed."""
    in_time, late = _most_in_time(turns, now_s)
    if index not in in_time:
        late.sort(key=lambda other: turns[other].place)
        return Before(in_time + late[: late.index(index)], False)
    found: list[int] = []
    while len(found) < MOST_FOLLOWED:
        first = _first_without_harm(turns, in_time, now_s)
        first = in_time[0] if first is None else first
        if first == index:
            return Before(found, True)
        in_time.remove(first)
        found.append(first)
        now_s += turns[first].left_s
    return Before(found + [other for other in in_time if turns[other].place < turns[index].place], True)


def long_overdue(turns: Sequence[Turn], arrangement: Arrangement, now_s: float) -> list[int]:
    """Of those that are late, who is so for long, by their places."""
    return [index for index in arrangement.order[arrangement.num_in_time :] if now_s - turns[index].due_s >= LONG_S]


def _most_in_time(turns: Sequence[Turn], now_s: float) -> tuple[list[int], list[int]]:
    """Indices of those that can be in time together, by when they are due, and of the others."""
    by_due = sorted(range(len(turns)), key=lambda index: (turns[index].due_s, turns[index].place))
    kept: list[tuple[int, float, int]] = []  # the least urgent first, of these the longest
    late: set[int] = set()
    ends_s = now_s
    for index in by_due:
        turn = turns[index]
        heapq.heappush(kept, (-turn.priority, -turn.left_s, index))
        ends_s += turn.left_s
        while ends_s > turn.due_s and kept:  # more than once where the least urgent is a short one
            _, left_out_s, dropped = heapq.heappop(kept)
            ends_s += left_out_s
            late.add(dropped)
    return [index for index in by_due if index not in late], sorted(late)


def _first_without_harm(turns: Sequence[Turn], in_time: Sequence[int], now_s: float) -> int | None:
    """Who has the first place of those that may go before all others and make nobody late."""
    best: int | None = None
    ends_s, spare_s = now_s, math.inf
    for index in in_time:
        turn = turns[index]
        if turn.left_s <= spare_s and (best is None or turn.place < turns[best].place):
            best = index
        ends_s += CAUTION * turn.left_s
        spare_s = min(spare_s, turn.due_s - ends_s)
    return best
