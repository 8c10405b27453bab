"""Goodput: the highest rate at which a share of all requests is inside its SLO.

first rate ─► doubled while it holds, halved while it fails ─► a bracket ─► bisected until it is narrow
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from ...protocol.errors import ConfigError


class Probe(NamedTuple):
    factor: float
    attainment: float


class Goodput(NamedTuple):
    """holds: the highest rate that was run and held. fails: the lowest rate above it that did not. None: there was none."""

    holds: Probe | None
    fails: Probe | None
    probes: tuple[Probe, ...]  # in the order of the runs
    ended: str  # why the search ended

    def as_dict(self) -> dict[str, Any]:
        plain = [probe and probe._asdict() for probe in (self.holds, self.fails)]
        return {"holds": plain[0], "fails": plain[1], "probes": [probe._asdict() for probe in self.probes], "ended": self.ended}


async def search_goodput(
    measure: Callable[[float], Awaitable[float | None]], first: float, *, level: float = 0.9, tolerance: float = 0.05, max_probes: int = 12
) -> Goodput:
    """
    Args:
        measure: attainment at a rate, or None if no time is left for another run.
        tolerance: the search ends at this relative width of the bracket.

    Raises ConfigError for a level outside (0, 1], or a first rate or tolerance that is not above 0.
    """
    if not 0 < level <= 1 or first <= 0 or tolerance <= 0:
        raise ConfigError(f"level {level}, first rate {first}, tolerance {tolerance}; the level must be in (0, 1], the others above 0")
    holds: Probe | None = None
    fails: Probe | None = None
    probes: list[Probe] = []
    factor = first
    ended = f"{max_probes} runs were made"
    while len(probes) < max_probes:
        found = await measure(factor)
        if found is None:
            ended = "no time was left for another run"
            break
        probe = Probe(factor, found)
        probes.append(probe)
        if found >= level:
            holds = probe
        else:
            fails = probe
        if holds is not None and fails is not None and fails.factor / holds.factor <= 1 + tolerance:
            ended = f"the bracket is narrower than {tolerance:.0%}"
            break
        factor = _next(holds, fails)
    return Goodput(holds, fails, tuple(probes), ended)


def _next(holds: Probe | None, fails: Probe | None) -> float:
    if fails is None:
        assert holds is not None
        return holds.factor * 2
    return fails.factor / 2 if holds is None else (holds.factor * fails.factor) ** 0.5
