"""early_rejection: the greater of the prefill pool's and the decode pool's load, before any work is done (arXiv 2407.00079, section 7.2).

load of a pool = predicted time / SLO: the least TTFT that is to be had; the step of a decode worker with the mean
load of them all as they run now, and this request in its batch.
What is still being prefilled is not seen, so that pools may swing against each other: see predictive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ..forecast import Forecast
from ..placement import PlacementRequest, Rejection, Selection, Snapshot
from ..predictors.timing import Predictors
from .base import Admission, Limits, decode_role, over_tpot, over_ttft


@dataclass(frozen=True, slots=True)
class EarlyRejection(Admission):
    limits: Limits
    predictors: Predictors
    name: ClassVar[str] = "early_rejection"

    @classmethod
    def create(cls, limits: Limits, predictors: Predictors) -> Self:
        return cls(limits, predictors)

    def judge(self, request: PlacementRequest, selection: Selection, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        slo = self.limits.of(request)
        num = len(decode_role(snapshot))
        num_running = int(snapshot.decode.num_running.sum())
        num_tokens = int(snapshot.decode.num_running_tokens.sum())
        mean_s = self.predictors.step.predict(num_running / num + 1, num_tokens / num + request.num_tokens)
        return over_ttft(forecast.ttft_s, slo) or over_tpot(mean_s, slo, forecast.ttft_s, f"on average over {num} workers")
