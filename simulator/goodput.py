"""Goodput: the highest replay speed at which a share of all requests is inside its SLO, rejected ones counted as outside.

speed ×1.3 until it fails ─► bisection ─► the last speed that held, and the least that failed
A scenario that does not know its SLO (no admission, fixed roles) gives one run for all SLOs: runs are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ..proxy.conductor.placement import Slo
from .cluster import simulate
from .outcome import Result
from .replay import ReplayOptions, replay
from .scenario import Scenario
from .trace import Trace

STRIDE = 1.3
FARTHEST = 2.0**12


class Goodput(NamedTuple):
    speed: float  # the highest that was run and held, with every slower one that was run; 0: none
    fails_at: float  # the least that was run and failed; inf: every speed held, so that the goodput is higher than `speed`
    attainment: float  # at speed; at fails_at where no speed held
    num_runs: int


class GoodputSearch:
    """
    Args:
        level: share of the requests that has to be inside.
        tolerance: relative width of the last bracket.
        on_run: told of every run, for progress.
        farthest: times the first speed, either way, that is tried.
        stop: asked after each run; a bracket is then as wide as it is.
    """

    def __init__(
        self, trace: Trace, options: ReplayOptions, *, level: float = 0.9, tolerance: float = 0.02,
        on_run: Callable[[Scenario, float, float], None] | None = None, farthest: float = FARTHEST,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._farthest = farthest
        self._stop = stop
        self._trace = trace
        self._options = options
        self._level = level
        self._tolerance = tolerance
        self._on_run = on_run
        self._results: dict[tuple[Scenario, float], Result] = {}
        self.num_runs = 0

    def attainment(self, scenario: Scenario, speed: float) -> float:
        found = self.result(scenario, speed).attainment(scenario.slo, scenario.judge)
        if self._on_run is not None:
            self._on_run(scenario, speed, found)
        return found

    def result(self, scenario: Scenario, speed: float) -> Result:
        """Of a run that was made before, or is made now."""
        sized = scenario.coupled and not scenario.chunk_tokens
        knows_slo = sized or scenario.flexible or scenario.admission != "none" or scenario.order in ("edf", "late", "short")
        key = scenario if knows_slo else scenario.with_(slo=Slo())
        found = self._results.get((key, speed))
        if found is None:
            options = dataclasses.replace(self._options, speed=speed)
            found = self._results[key, speed] = Result(simulate(scenario, replay(self._trace, options)))
            self.num_runs += 1
        return found

    def search(self, scenario: Scenario, first: float = 1.0) -> Goodput:
        """first: where to begin."""
        begun = self.num_runs
        low, high = 0.0, float("inf")
        low_found = high_found = 0.0
        speed = first
        while high == float("inf") or high - low > self._tolerance * high:
            found = self.attainment(scenario, speed)
            if found >= self._level:
                low, low_found = speed, found
                if low >= first * self._farthest:
                    break
            else:
                high, high_found = speed, found
                if high <= first / self._farthest:
                    break
            if self._stop():
                break
            if high == float("inf"):
                speed = low * STRIDE
            else:
                speed = (low + high) / 2 if low else high / STRIDE
        return Goodput(low, high, low_found if low else high_found, self.num_runs - begun)
