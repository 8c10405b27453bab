"""Goodput: the highest replay speed at which a share of all requests is inside its SLO, rejected ones counted as outside.

speed ×1.3 until it fails ─► bisection ─► interpolated between the last two
A scenario that does not know its SLO (no admission, fixed roles) gives one run for all SLOs: runs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..proxy.conductor.placement import Slo
from .cluster import simulate
from .outcome import Result
from .replay import ReplayOptions, replay
from .scenario import Scenario
from .trace import Trace

STRIDE = 1.3


class Goodput(NamedTuple):
    speed: float
    attainment: float  # at the highest speed that was run and held
    num_runs: int


class GoodputSearch:
    """
    Args:
        level: share of the requests that has to be inside.
        tolerance: relative width of the last bracket.
        on_run: told of every run, for progress.
    """

    def __init__(
        self, trace: Trace, options: ReplayOptions, *, level: float = 0.9, tolerance: float = 0.02,
        on_run: Callable[[Scenario, float, float], None] | None = None,
    ) -> None:  # fmt: skip
        self._trace = trace
        self._options = options
        self._level = level
        self._tolerance = tolerance
        self._on_run = on_run
        self._results: dict[tuple[Scenario, float], Result] = {}
        self.num_runs = 0

    def attainment(self, scenario: Scenario, speed: float) -> float:
        sized = scenario.coupled and not scenario.chunk_tokens
        knows_slo = sized or scenario.flexible or scenario.admission != "none" or scenario.order in ("late", "short")
        key = scenario if knows_slo else scenario.with_(slo=Slo())
        result = self._results.get((key, speed))
        if result is None:
            options = ReplayOptions(
                speed=speed, sample=self._options.sample, dequantise=self._options.dequantise, start_s=self._options.start_s,
                duration_s=self._options.duration_s, warm_s=self._options.warm_s, seed=self._options.seed,
            )  # fmt: skip
            result = self._results[key, speed] = Result(simulate(scenario, replay(self._trace, options)))
            self.num_runs += 1
        found = result.attainment(scenario.slo)
        if self._on_run is not None:
            self._on_run(scenario, speed, found)
        return found

    def search(self, scenario: Scenario, first: float = 1.0) -> Goodput:
        """first: where to begin. Speed 0 where nothing above 1/32 of it holds, 32 times it where that holds still."""
        begun = self.num_runs
        low, high = 0.0, float("inf")
        low_found, high_found = 1.0, 0.0
        speed = first
        while high == float("inf") or high - low > self._tolerance * high:
            found = self.attainment(scenario, speed)
            if found >= self._level:
                low, low_found = speed, found
                if low >= first * 32:
                    break
                speed = speed * STRIDE if high == float("inf") else (low + high) / 2
            else:
                high, high_found = speed, found
                if high < first / 32:
                    return Goodput(0.0, found, self.num_runs - begun)
                speed = speed / STRIDE if low == 0.0 else (low + high) / 2
        if high == float("inf"):
            return Goodput(low, low_found, self.num_runs - begun)
        share = (low_found - self._level) / max(low_found - high_found, 1e-9)
        return Goodput(low + share * (high - low), low_found, self.num_runs - begun)
