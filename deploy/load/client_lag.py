"""How late the load generator itself was, so that its own delays are not taken for the server's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...protocol.tasks import beside

PERIOD_S = 0.005
MAX_CPU = 0.9  # of one core
MAX_GAP_OF_TPOT = 0.25
MAX_LATE_OF_TTFT = 0.1
LEAST_S = 0.005  # a normal delay of the kernel's and the loop's timers


@dataclass(slots=True)
class LagMeter:
    """A task that wakes every 5 ms and notes how late it is. While it could not run, no answer was read or time-stamped either."""

    gaps_s: list[float] = field(default_factory=list[float])
    cpu_share: float = 0.0

    @asynccontextmanager
    async def measuring(self) -> AsyncGenerator[None, None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            async with beside(self._watch()):
                yield
        finally:
            self.cpu_share = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)

    async def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(PERIOD_S)
            self.gaps_s.append(max(0.0, time.perf_counter() - before - PERIOD_S))


def client_lag(meter: LagMeter, late_s: Sequence[float], ttft_p50_s: float | None, tpot_p50_s: float | None) -> dict[str, Any]:
    """The client's figures. "limited_by" says why it may have been the bottleneck, and is empty if it was not."""
    gap_p99, gap_max = (_quantile(meter.gaps_s, share) for share in (0.99, 1.0))
    late_p99, late_max = (_quantile(late_s, share) for share in (0.99, 1.0))
    found: list[str] = []
    if meter.cpu_share > MAX_CPU:
        found.append(f"it used {meter.cpu_share:.0%} of the one core it can use")
    if gap_p99 > max(LEAST_S, MAX_GAP_OF_TPOT * (tpot_p50_s or 0.0)):
        found.append(f"its event loop stood still for up to {gap_p99 * 1e3:.1f} ms (p99), beside a median TPOT of {_ms(tpot_p50_s)}")
    if late_p99 > max(LEAST_S, MAX_LATE_OF_TTFT * (ttft_p50_s or 0.0)):
        found.append(f"requests were sent up to {late_p99 * 1e3:.1f} ms late (p99), beside a median TTFT of {_ms(ttft_p50_s)}")
    return {
        "cpu_share": meter.cpu_share, "loop_gap_p99_s": gap_p99, "loop_gap_max_s": gap_max,
        "late_p99_s": late_p99, "late_max_s": late_max, "limited_by": found,
    }  # fmt: skip


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value * 1e3:.1f} ms"
