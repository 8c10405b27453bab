"""ttft_tbt: Algorithm 1's line 18. Predicted TTFT on the chosen prefill worker, step time on the chosen decode worker, as it runs now.

two_stage is the baseline of arXiv 2407.00079, Table 3: TTFT at the arrival, step time only when the prefill is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..forecast import Forecast
from ..placement import Choice, PlacementRequest, Rejection, Snapshot
from .base import Limits, over_tpot, over_ttft


@dataclass(frozen=True, slots=True)
class TtftTbt:
    limits: Limits
    name: ClassVar[str] = "ttft_tbt"
    checks_again: ClassVar[bool] = True

    def judge(self, request: PlacementRequest, choice: Choice, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        slo = self.limits.of(request)
        return over_ttft(forecast.ttft_s, slo) or over_tpot(forecast.tpot_s, slo, forecast.ttft_s, f"on {choice.decode.id}")


@dataclass(frozen=True, slots=True)
class TwoStage:
    limits: Limits
    name: ClassVar[str] = "two_stage"
    checks_again: ClassVar[bool] = True

    def judge(self, request: PlacementRequest, choice: Choice, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        return over_ttft(forecast.ttft_s, self.limits.of(request))
