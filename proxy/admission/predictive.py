"""predictive: early rejection by the decode load at the time this request's prefill will end (arXiv 2407.00079, section 7.4).

now ──────────────── t = now + predicted TTFT
who runs now is there at t with the chance that a request of that age lasts so much longer; prefills predicted to end before t have
joined, spread evenly, and are there with the chance of their age at t. The paper lets every request decode for one uniform time t_d:
who is older would be gone, and with answers of 2 to 2,000 tokens half of the load is older. So the chance comes from the last decode
times seen; before there are some, from a uniform t_d.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

from ..forecast import Forecast
from ..placement import Choice, PlacementRequest, Rejection, Snapshot
from ..predictors.timing import Predictors
from .base import Limits, over_tbt, over_ttft

DECODE_S = 15.0  # t_d, before requests have ended
NUM_SEEN = 500  # decode times remembered
NUM_ENOUGH = 20  # of them to go by


@dataclass(slots=True)
class Predictive:
    """snapshot.arriving and snapshot.leaving are to be filled in."""

    limits: Limits
    predictors: Predictors
    decode_s: float = DECODE_S
    _seen: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SEEN))
    _sorted: list[float] = field(default_factory=list)
    name: ClassVar[str] = "predictive"
    checks_again: ClassVar[bool] = True

    def observe_decode(self, seconds: float) -> None:
        """A request has decoded for so long."""
        if len(self._seen) == NUM_SEEN:
            del self._sorted[bisect_left(self._sorted, self._seen[0])]
        self._seen.append(seconds)
        insort(self._sorted, seconds)
        self.decode_s = self._sorted[len(self._sorted) // 2]

    def lasting(self, age_s: float, more_s: float) -> float:
        """Chance that a request that has decoded for age_s will do so for more_s longer."""
        num = len(self._sorted)
        if num < NUM_ENOUGH:
            return 1.0 if age_s + more_s < self.decode_s else 0.0
        num_older = num - bisect_right(self._sorted, age_s)
        if num_older == 0:
            return 0.5  # older than any that was seen
        return (num - bisect_right(self._sorted, age_s + more_s)) / num_older

    def judge(self, request: PlacementRequest, choice: Choice, forecast: Forecast, snapshot: Snapshot) -> Rejection | None:
        slo = self.limits.of(request)
        step_s = self.step_at(request, forecast.ttft_s, snapshot)
        return over_ttft(forecast.ttft_s, slo) or over_tbt(
            step_s, slo, max(self.decode_s, 1.0), f"in {forecast.ttft_s:.1f} s, when its prefill ends"
        )

    def step_at(self, request: PlacementRequest, ahead_s: float, snapshot: Snapshot) -> float:
        """Predicted step of a decode worker with the pool's mean load ahead_s from now, and the request in its batch."""
        then_s = snapshot.now_s + ahead_s
        num_running = len(snapshot.leaving)
        num_kept = sum(self.lasting(snapshot.now_s - began_s, ahead_s) for began_s in snapshot.leaving)
        # whose tokens leave is not known by request: the mean context stands for all
        num_tokens = sum(member.num_running_tokens for member in snapshot.decode) * (num_kept / num_running if num_running else 0.0)
        num_joined = num_joined_tokens = 0.0
        for one in snapshot.arriving:
            if one.at_s <= then_s:
                chance = self.lasting(0.0, then_s - one.at_s)
                num_joined += chance
                num_joined_tokens += chance * one.num_tokens
        num = len(snapshot.decode)
        return self.predictors.step.predict((num_kept + num_joined) / num + 1, (num_tokens + num_joined_tokens) / num + request.num_tokens)
