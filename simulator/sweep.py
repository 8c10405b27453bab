"""Many runs of one trace: policies x admissions x splits, seeds apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from .cluster import simulate
from .outcome import Result, mean_and_sd
from .replay import Replay
from .scenario import Scenario


class SweepRow(NamedTuple):
    """Means over the seeds."""

    scenario: Scenario
    figures: dict[str, float]
    sds: dict[str, float]


def scenarios(base: Scenario, policies: Sequence[str], admissions: Sequence[str], splits: Sequence[tuple[int, int]]) -> list[Scenario]:
    """A policy that plans roles knows no split: one scenario for all of them."""
    found: list[Scenario] = []
    for policy, admission, (num_prefill, num_decode) in itertools.product(policies, admissions, splits):
        made = base.with_(policy=policy, admission=admission, num_prefill=num_prefill, num_decode=num_decode)
        if made.flexible and any((one.policy, one.admission) == (policy, admission) for one in found):
            continue
        found.append(made)
    return found


def sweep(
    chosen: Iterable[Scenario], replay_of: Callable[[int], Replay], seeds: Sequence[int], on_run: Callable[[Scenario], None] | None = None
) -> Iterator[SweepRow]:
    """replay_of: the requests for a seed."""
    for scenario in chosen:
        runs: list[dict[str, float]] = []
        for seed in seeds:
            runs.append(Result(simulate(scenario.with_(seed=seed), replay_of(seed))).summary(scenario.slo))
            if on_run is not None:
                on_run(scenario)
        pairs = {name: mean_and_sd([run[name] for run in runs]) for name in runs[0]}
        yield SweepRow(scenario, {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()})
