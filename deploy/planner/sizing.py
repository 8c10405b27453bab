"""The cheapest form that holds the SLO with margin: forms of ever more instances, until one of them does.

alone: can anything hold it? ─► n = the least that the work needs … ─► coupled, adaptive, splits (a climb) at load x (1 + margin)
                                                                       └─► one holds ─► what it and the others of its size carry
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...proxy.conductor.placement import Slo
from ...simulator.grid import busy_s
from ...simulator.scenario import Scenario
from .forms import Form, adaptive, coupled, neighbours, split
from .runner import Carried, Runner, Search
from .seen import Seen
from .window import Window, mean_lengths

IDLE = 0.02  # of the load: requests that meet nobody
LIKELY = 0.9  # of the work's instances, from which on sizes are tried: windows differ
NEAR = 0.1  # share in SLO by which a form may be behind the best and still be searched
POOR = 0.5  # share in SLO, under which a size is too small by far, and a search begins at half the load
ALIKE = 0.03  # of the speed that is carried: forms that differ by less are equal


class Target(NamedTuple):
    slo: Slo
    level: float  # share of the requests that has to be in SLO
    margin: float  # load that it has to hold beyond the trace's


class Tried(NamedTuple):
    """A form at the load with its margin."""

    form: Form
    seen: Seen


class Finalist(NamedTuple):
    form: Form
    seen: Seen  # at the load itself
    carried: Carried


class Plan(NamedTuple):
    alone: Seen  # one coupled instance under next to no load
    tried: list[Tried]
    finalists: list[Finalist]  # of one size, the best first
    holds: bool  # the first finalist carries the load with its margin
    num_skipped: int  # sizes below those that were tried, which the work alone needs more than
    out_of_time: bool


def size(window: Window, base: Scenario, target: Target, num_instances: int, runner: Runner) -> Plan:
    """base: without a form. num_instances: that there are."""
    slo, wanted = target.slo, window.speed * (1.0 + target.margin)
    (alone,) = runner.run([(coupled(1).scenario(base), slo, window.speed * IDLE)])
    first = min(max(math.ceil(window.work * wanted * LIKELY), 1), num_instances)
    if alone.attainment < target.level:
        return Plan(alone, [], [], False, 0, runner.out_of_time)
    tried: list[Tried] = []
    for num in range(first, num_instances + 1):
        tried += _try(num, window, base, slo, wanted, runner, last=num == num_instances)
        if _best(tried, num).seen.attainment >= target.level or runner.out_of_time:
            break
    num = tried[-1].form.num_instances
    finalists = _finals(_kinds(tried, num), window, base, target, runner)
    holds = finalists[0].carried.speed >= wanted * 0.999
    return Plan(alone, tried, finalists, holds, first - 1, runner.out_of_time)


def _try(num: int, window: Window, base: Scenario, slo: Slo, speed: float, runner: Runner, *, last: bool) -> list[Tried]:
    """All coupled and the likeliest split; where these are not far off, or there is no larger size, adaptive and more splits, uphill."""
    found = _run([coupled(num), *([_likely(window, base, num)] if num > 1 else [])], base, slo, speed, runner)
    if num == 1 or (not last and max(one.seen.attainment for one in found) < POOR):
        return found
    splits = found[1:]
    more = [adaptive(num), *neighbours(splits[0].form)]
    while more and not runner.out_of_time:
        new = _run(more, base, slo, speed, runner)
        found += new
        splits += [one for one in new if one.form.kind == "split"]
        more = [form for form in neighbours(max(splits, key=_rank).form) if form not in {one.form for one in splits}]
    return found


def _run(forms: Sequence[Form], base: Scenario, slo: Slo, speed: float, runner: Runner) -> list[Tried]:
    return [Tried(form, one) for form, one in zip(forms, runner.run([(form.scenario(base), slo, speed) for form in forms]), strict=True)]


def _likely(window: Window, base: Scenario, num: int) -> Form:
    """The split by the work of both phases."""
    num_input, num_output = mean_lengths(window.trace.requests)
    prefill_s, all_s = base.cost.prefill_time(round(num_input), 0), busy_s(num_input, num_output, base.cost)
    return split(min(max(round(num * prefill_s / all_s), 1), num - 1), num)


def _rank(one: Tried) -> tuple[float, float]:
    return one.seen.attainment, -one.seen.ttft_p90_s


def _best(tried: Sequence[Tried], num: int) -> Tried:
    return max((one for one in tried if one.form.num_instances == num), key=_rank)


def _kinds(tried: Sequence[Tried], num: int) -> list[Tried]:
    """The best of each kind of this size, as far as it is near the best of all; the best first."""
    best: dict[str, Tried] = {}
    for one in sorted((one for one in tried if one.form.num_instances == num), key=_rank, reverse=True):
        best.setdefault(one.form.kind, one)
    first, *others = best.values()
    return [first, *(one for one in others if one.seen.attainment >= first.seen.attainment - NEAR)]


def _finals(found: Sequence[Tried], window: Window, base: Scenario, target: Target, runner: Runner) -> list[Finalist]:
    asked = [Search(one.form.scenario(base), target.slo, _begin(one, window, target), window.speed) for one in found]
    finals = [
        Finalist(one.form, most.at_load, most._replace(curve=tuple(sorted({*most.curve, (one.seen.speed, one.seen.attainment)}))))
        for one, most in zip(found, runner.carried(asked), strict=True)
    ]
    finals.sort(key=lambda one: -one.carried.speed)
    near = [one for one in finals if one.carried.speed >= finals[0].carried.speed * (1.0 - ALIKE)]
    first = min(near, key=lambda one: ("coupled", "split", "adaptive").index(one.form.kind))  # of equals the simplest
    return [first, *(one for one in finals if one is not first)]


def _begin(one: Tried, window: Window, target: Target) -> float:
    """The speed at which a search finds its bracket soonest."""
    if one.seen.attainment >= target.level:
        return one.seen.speed
    return window.speed if one.seen.attainment >= POOR else window.speed / 2
