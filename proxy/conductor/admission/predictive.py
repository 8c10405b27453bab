"""predictive: early rejection by what is to come: the load when this request's prefill will end, and what the last half minute asked for.

now ──────────────── t = now + predicted TTFT
who runs now is there at t with the chance that a request of that age lasts so much longer; prefills predicted to end before t have
joined, spread evenly, and are there with the chance of their age at t (arXiv 2407.00079, section 7.4). The paper lets every request
decode for one uniform time t_d: who is older would be gone, and with answers of 2 to 2,000 tokens half of the load is older. So the
chance comes from the last decode times seen; before there are some, from a uniform t_d.

A better forecast alone serves fewer: told the truth about room, it fills it with whoever comes first, long contexts included, where a
coarse one keeps those out. So, unlike the paper's, this one also refuses who would take too much while all cannot be served: BidPrice.
While that is so, a first token has to be promised within the SLO (nine of ten come within the promise); else to be predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

from ..forecast import Forecast
from ..placement import PlacementRequest, Rejection, Selection, Snapshot, come_back
from ..pool import total
from ..predictors.timing import Predictors
from .base import Admission, Limits, decode_role, over_tpot, over_ttft
from .bid_price import BidPrice
from .decode_times import DecodeTimes


@dataclass(slots=True)
class Predictive(Admission):
    limits: Limits
    predictors: Predictors
    times: DecodeTimes = field(default_factory=DecodeTimes)
    price: BidPrice = field(init=False)
    name: ClassVar[str] = "predictive"
    wants_arrivals: ClassVar[bool] = True

    @classmethod
    def create(cls, limits: Limits, predictors: Predictors) -> Self:
        return cls(limits, predictors)

    def __post_init__(self) -> None:
        self.price = BidPrice(self.predictors)

    def observe_decode(self, seconds: float, num_tokens: int = 0) -> None:
        self.times.observe(seconds, num_tokens)

    def judge(self, request: PlacementRequest, selection: Selection, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        slo, times = self.limits.of(request), self.times
        mean_s = times.mean_s
        expected_s = times.expected_s(request.num_tokens)
        too_dear = times.known and self.price.ask(request, selection, snapshot, self.limits.slo, expected_s, mean_s)
        # while all can be served, to refuse one that may be late helps nobody; else it takes what another is promised
        late = over_ttft(forecast.promised_s if math.isfinite(self.price.limit) else forecast.ttft_s, slo)
        if late is not None:
            return late
        if too_dear:
            found = f"more is asked for than can be served, and {request.num_tokens} tokens are more than there is room for"
            return Rejection("overloaded", f"{found}; {come_back(mean_s)}", mean_s)
        if self._step_with_all(request, snapshot) <= slo.tpot_s:  # whoever leaves until then; most are admitted here
            return None
        ahead_s = forecast.ttft_s - request.waited_s
        step_s = self.step_at(request, ahead_s, snapshot)
        return over_tpot(step_s, slo, max(times.median_s, 1.0), f"in {ahead_s:.1f} s, when its prefill ends")

    def _step_with_all(self, request: PlacementRequest, snapshot: Snapshot) -> float:
        """The step if nobody left and all that arrive had joined."""
        num, arriving = len(decode_role(snapshot)), snapshot.arriving
        num_tokens = int(snapshot.decode.num_running_tokens.sum()) + int(arriving.num_tokens.sum())
        num_sequences = len(snapshot.began_s) + len(arriving.at_s)
        return self.predictors.step.predict(num_sequences / num + 1, num_tokens / num + request.num_tokens)

    def step_at(self, request: PlacementRequest, ahead_s: float, snapshot: Snapshot) -> float:
        """Predicted step of a decode worker with the pool's mean load ahead_s from now, and the request in its batch."""
        then_s, lasting, arriving = snapshot.now_s + ahead_s, self.times.lasting, snapshot.arriving
        num_running = len(snapshot.began_s)
        num_kept = total(lasting(snapshot.now_s - snapshot.began_s, ahead_s))
        # whose tokens leave is not known by request: the mean context stands for all
        num_tokens = int(snapshot.decode.num_running_tokens.sum()) * (num_kept / num_running if num_running else 0.0)
        joined = arriving.at_s <= then_s
        chances = lasting(0.0, then_s - arriving.at_s[joined])
        num_joined, num_joined_tokens = total(chances), total(chances * arriving.num_tokens[joined])
        num = len(decode_role(snapshot))
        return self.predictors.step.predict((num_kept + num_joined) / num + 1, (num_tokens + num_joined_tokens) / num + request.num_tokens)
