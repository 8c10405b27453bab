"""ttft_tbt: Algorithm 1's line 18. Predicted TTFT on the chosen prefill worker, step time on the chosen decode worker, as it runs now.

two_stage is the baseline of arXiv 2407.00079, Table 3: TTFT at the arrival, step time only when the prefill is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ..forecast import Forecast
from ..placement import PlacementRequest, Rejection, Selection, Snapshot
from ..predictors.timing import Predictors
from .base import Admission, Limits, over_tpot, over_ttft


@dataclass(frozen=True, slots=True)
class TtftTbt(Admission):
    limits: Limits
    name: ClassVar[str] = "ttft_tbt"

    @classmethod
    def create(cls, limits: Limits, predictors: Predictors) -> Self:
        return cls(limits)

    def judge(self, request: PlacementRequest, selection: Selection, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        slo = self.limits.of(request)
        return over_ttft(forecast.ttft_s, slo) or over_tpot(forecast.tpot_s, slo, forecast.ttft_s, f"on {selection.decode.id}")


@dataclass(frozen=True, slots=True)
class TwoStage(Admission):
    limits: Limits
    name: ClassVar[str] = "two_stage"

    @classmethod
    def create(cls, limits: Limits, predictors: Predictors) -> Self:
        return cls(limits)

    def judge(self, request: PlacementRequest, selection: Selection, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        return over_ttft(forecast.ttft_s, self.limits.of(request))
