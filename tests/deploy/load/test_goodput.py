"""The search on servers whose attainment is a formula."""

from __future__ import annotations

import math

import pytest

from halfmoon.deploy.load.goodput import search_goodput
from halfmoon.protocol.errors import ConfigError


def queue(service_rate: float, limit_s: float):
    """An M/M/1 queue: P(sojourn <= t) = 1 - exp(-(mu - lambda) t)."""

    async def attained(rate: float) -> float:
        return 1 - math.exp(-(service_rate - rate) * limit_s) if rate < service_rate else 0.0

    return attained


@pytest.mark.parametrize("first", [0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
async def test_the_bracket_holds_the_analytic_rate(first: float, level: float) -> None:
    exact = 8.0 + math.log(1 - level) / 2.0
    found = await search_goodput(queue(8.0, 2.0), first, level=level, tolerance=0.02, max_probes=40)
    assert found.holds is not None and found.fails is not None
    assert found.holds.factor <= exact < found.fails.factor and found.fails.factor / found.holds.factor <= 1.02
    assert found.holds.attainment >= level > found.fails.attainment


async def test_a_search_ends_when_its_runs_are_spent_and_says_so() -> None:
    found = await search_goodput(queue(8.0, 2.0), 1.0, max_probes=3)
    assert len(found.probes) == 3 and found.ended == "3 runs were made" and found.fails is None


async def test_a_server_that_never_holds_has_no_goodput() -> None:
    async def nothing(rate: float) -> float:
        return 0.2

    found = await search_goodput(nothing, 4.0, max_probes=5)
    assert found.holds is None and found.fails is not None and found.fails.factor == 4.0 / 16


async def test_a_search_without_time_left_gives_what_it_has() -> None:
    left = iter([1.0, 1.0])

    async def measure(rate: float) -> float | None:
        return next(left, None)

    found = await search_goodput(measure, 2.0)
    assert found.holds is not None and found.holds.factor == 4.0 and "no time" in found.ended


async def test_wrong_levels_are_told() -> None:
    with pytest.raises(ConfigError, match="level"):
        await search_goodput(queue(8.0, 2.0), 1.0, level=1.5)
