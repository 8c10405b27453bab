"""A policy against the baselines that it is to contain, cell by cell: loads x sizes x SLOs x cost models.

cell ─► coupled (sized chunks, then constants) and every split ─► the highest goodput of them ─► the policy's goodput by it
All have the same requests, caches, predictors, queue order and chunk sizer. The coupled router sees decode load as well as queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..proxy.conductor.placement import Slo
from ..proxy.conductor.predictors.cost_model import CostModel
from .goodput import Goodput, GoodputSearch
from .loads import Load, shift
from .replay import ReplayOptions
from .scenario import Scenario
from .trace import Trace

SLOS = {"tight": (3.0, 2.0), "medium": (8.0, 3.5), "loose": (15.0, 8.0)}
"""TTFT by the prefill of a prompt of the 90th percentile; TPOT by the step of one sequence of mean context."""
LOADS = {
    "answers": Load("answers", 200, 1_100),
    "reasoning": Load("reasoning", 1_155, 1_055, spread=1.0),
    "chat": Load("chat", 1_155, 211, spread=1.0),
    "code": Load("code", 2_000, 30, burst=3.0),
    "agent": Load("agent", 8_000, 150, spread=1.0, burst=2.0),
}
SHIFTS = {"code to answers": ("code", "answers"), "answers to agent": ("answers", "agent")}
CHUNKS = (256, 512)
LIFETIMES = 2.0  # of a mean answer at the pace of the SLO, that a load lasts at least
LEAST_S = 6.0
FEWEST, MOST = 400, 1_600  # requests


@dataclass(frozen=True, slots=True)
class Cell:
    load: str
    num_instances: int
    slo_name: str
    cost: CostModel

    @property
    def title(self) -> str:
        return f"{self.load}, {self.num_instances} x {self.cost.name}, {self.slo_name}"


class CellResult(NamedTuple):
    cell: Cell
    slo: Slo
    num_requests: int
    coupled: Goodput
    coupled_form: str
    split: Goodput
    split_form: str
    policy: Goodput
    attainment: float  # of the policy at the speed of the best baseline
    attainment_by_tbt: float
    num_role_changes: int

    @property
    def ratio(self) -> float:
        """Of the policy's goodput to the best baseline's."""
        return self.policy.speed / max(self.coupled.speed, self.split.speed, 1e-12)


def made(load: str, num_instances: int, slo_name: str, cost: CostModel, seed: int = 0) -> Trace:
    """At a rate that keeps all instances busy, by the cost model alone; for some answers' time, if that is not too many requests."""
    if load in SHIFTS:
        return shift(*(made(name, num_instances, slo_name, cost, seed) for name in SHIFTS[load]))
    shape = LOADS[load]
    rate = num_instances / busy_s(shape.num_input_tokens, shape.num_output_tokens, cost)
    answer_s = shape.num_output_tokens * SLOS[slo_name][1] * cost.step_s
    num = round(rate * max(LIFETIMES * answer_s, LEAST_S))
    return shape.make(min(max(num, FEWEST), MOST), rate, seed)


def busy_s(num_input: float, num_output: float, cost: CostModel) -> float:
    """Seconds that a request keeps an instance busy, of a batch in which nothing waits for the read of the weights."""
    context = num_input + num_output / 2
    each_s = cost.per_sequence_s + context * cost.per_kv_token_s
    batch = cost.kv_capacity_tokens / context
    return cost.prefill_time(round(num_input), 0) + num_output * (each_s + cost.step_s / batch)


def slo_of(name: str, trace: Trace, cost: CostModel) -> Slo:
    by_prefill, by_step = SLOS[name]
    inputs = [request.num_input_tokens for request in trace.requests]
    context = float(np.mean([request.num_input_tokens + request.num_output_tokens / 2 for request in trace.requests]))
    longest = round(float(np.percentile(inputs, 90)))
    return Slo(by_prefill * cost.prefill_time(longest, 0), by_step * cost.step_time(1, round(context)))


class Judge:
    """
    Args:
        base: what all arms have in common.
        options: of the replay; its speed is not used.
        on_run: told of every run.
    """

    def __init__(self, base: Scenario, trace: Trace, options: ReplayOptions, *, level: float = 0.9, tolerance: float = 0.02,
                 on_run: Callable[[Scenario, float, float], None] | None = None) -> None:  # fmt: skip
        self._base = base
        self.search = GoodputSearch(trace, options, level=level, tolerance=tolerance, on_run=on_run)
        self._level = level
        self._tolerance = tolerance

    def best_coupled(self, first: float) -> tuple[Goodput, str]:
        """Chunks sized by the SLO, and constants where one of them is better."""
        base = self._base.with_(coupled=True, policy="kvcache_centric", num_prefill=self._base.num_instances, num_decode=0)
        found, form = self.search.search(base, first), "sized chunks"
        for chunk in CHUNKS:
            found, form = self._better(base.with_(chunk_tokens=chunk), f"chunk {chunk}", found, form, first)
        return found, form

    def best_split(self, first: float) -> tuple[Goodput, str]:
        total = self._base.num_instances
        base = self._base.with_(policy="kvcache_centric")
        halves = sorted(range(1, total), key=lambda number: abs(2 * number - total))
        found, form = Goodput(0.0, first / 4, 0.0, 0), "none"
        for number in halves:
            split = base.with_(num_prefill=number, num_decode=total - number)
            found, form = self._better(split, f"{number}P{total - number}D", found, form, found.fails_at)
        return found, form

    def policy(self, name: str, first: float) -> Goodput:
        total = self._base.num_instances
        return self.search.search(self._base.with_(policy=name, num_prefill=total // 2, num_decode=total - total // 2), first)

    def _better(self, other: Scenario, form: str, found: Goodput, found_form: str, first: float) -> tuple[Goodput, str]:
        """One run above what is known decides whether a search pays."""
        if found.speed and self.search.attainment(other, found.fails_at) < self._level:
            return found, found_form
        better = self.search.search(other, found.fails_at if found.speed else first)
        return (better, form) if better.speed > found.speed else (found, found_form)


def judge(cell: Cell, trace: Trace, base: Scenario, options: ReplayOptions, policy: str = "adaptive", first: float = 0.7) -> CellResult:
    """trace: the cell's. base: its instances; the SLO comes from the cell."""
    slo = slo_of(cell.slo_name, trace, cell.cost)
    base = base.with_(cost=cell.cost, slo=slo, num_prefill=cell.num_instances // 2, num_decode=cell.num_instances - cell.num_instances // 2)
    bench = Judge(base, trace, options)
    coupled, coupled_form = bench.best_coupled(first)
    split, split_form = bench.best_split(coupled.speed or first)
    best = max(coupled.speed, split.speed)
    found = bench.policy(policy, best or first)
    at = bench.search.result(base.with_(policy=policy), best or first)
    return CellResult(
        cell, slo, at.num_requests, coupled, coupled_form, split, split_form, found,
        at.attainment(slo), at.attainment(slo, "tbt"), at.cluster.counters.num_role_changes,
    )  # fmt: skip


def cells(loads: Sequence[str], sizes: Sequence[int], slo_names: Sequence[str], costs: Sequence[CostModel]) -> Iterator[Cell]:
    for size in sizes:
        for cost in costs:
            for load in loads:
                for slo_name in slo_names:
                    yield Cell(load, size, slo_name, cost)
