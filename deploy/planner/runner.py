"""Runs of one window, on all cores: a process each, which keeps what it has run."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, TypeVar

from ...proxy.conductor.placement import Slo
from ...simulator.goodput import GoodputSearch
from ...simulator.replay import ReplayOptions
from ...simulator.scenario import Scenario
from ...simulator.trace import Trace
from .seen import Seen, seen

TOLERANCE = 0.08  # of the last bracket of a goodput
FARTHEST = 4.0  # times the first speed, either way, that is tried
MOST_PROCESSES = 8

Found = TypeVar("Found")


class Search(NamedTuple):
    """What is to be run: for the highest speed, from `first` on, and once at the load itself."""

    scenario: Scenario
    slo: Slo
    first: float
    load: float
    ends_at_s: float = math.inf
    """Of time.monotonic(), which all processes of a machine share: the bracket is then as wide as it is."""


class Carried(NamedTuple):
    """The highest speed that held, and what was tried."""

    speed: float  # 0: none
    fails_at: float  # inf: every speed held
    curve: tuple[tuple[float, float], ...]  # speed, share in SLO; ascending
    breaks: str  # at fails_at
    at_load: Seen


class Searches:
    """One process's runs."""

    def __init__(self, trace: Trace, options: ReplayOptions, level: float) -> None:
        self._curve: list[tuple[float, float]] = []
        self._ends_at_s = math.inf
        self._search = GoodputSearch(
            trace, options, level=level, tolerance=TOLERANCE, on_run=lambda _, speed, share: self._curve.append((speed, share)),
            farthest=FARTHEST, stop=lambda: time.monotonic() >= self._ends_at_s,
        )  # fmt: skip

    def run(self, scenario: Scenario, slo: Slo, speed: float) -> Seen:
        return seen(self._search.result(scenario, speed), slo, speed)

    def carried(self, asked: Search) -> Carried:
        self._curve.clear()
        self._ends_at_s = asked.ends_at_s
        found = self._search.search(asked.scenario, asked.first)
        breaks = "" if found.fails_at == float("inf") else self.run(asked.scenario, asked.slo, found.fails_at).breaks
        at_load = self.run(asked.scenario, asked.slo, asked.load)
        curve = {*self._curve, (asked.load, at_load.attainment)}
        return Carried(found.speed, found.fails_at, tuple(sorted(curve)), breaks, at_load)


_own: Searches | None = None  # of a worker process


def _begin(trace: Trace, options: ReplayOptions, level: float) -> None:
    global _own
    _own = Searches(trace, options, level)


def _run(scenario: Scenario, slo: Slo, speed: float) -> Seen:
    assert _own is not None
    return _own.run(scenario, slo, speed)


def _carried(asked: Search) -> Carried:
    assert _own is not None
    return _own.carried(asked)


class Runner:
    """
    Args:
        num_processes: 0: one a core; 1: none of its own.
        budget_s: after which nothing more is begun.
        on_run: told how many runs and searches have ended.
    """

    def __init__(self, trace: Trace, options: ReplayOptions, level: float, *, num_processes: int = 0, budget_s: float = float("inf"),
                 on_run: Callable[[int], None] | None = None) -> None:  # fmt: skip
        self._num = num_processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        self._own = Searches(trace, options, level)
        self._pool: ProcessPoolExecutor | None = None
        if self._num > 1:
            # spawned: a fork would copy the locks of the progress bar's thread
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num, context, _begin, (trace, options, level))
        self._ends_at_s = time.monotonic() + budget_s
        self._on_run = on_run
        self.num_runs = 0

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._ends_at_s

    def run(self, asked: Sequence[tuple[Scenario, Slo, float]]) -> list[Seen]:
        if self._pool is None:
            return [self._told(self._own.run(*one)) for one in asked]
        return self._all([self._pool.submit(_run, *one) for one in asked])

    def carried(self, asked: Sequence[Search]) -> list[Carried]:
        asked = [one._replace(ends_at_s=self._ends_at_s) for one in asked]
        if self._pool is None:
            return [self._told(self._own.carried(one)) for one in asked]
        return self._all([self._pool.submit(_carried, one) for one in asked])

    def _all(self, futures: list[Future[Found]]) -> list[Found]:
        return [self._told(future.result()) for future in futures]

    def _told(self, found: Found) -> Found:
        self.num_runs += 1
        if self._on_run is not None:
            self._on_run(self.num_runs)
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
