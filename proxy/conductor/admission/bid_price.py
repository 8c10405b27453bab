"""What a request would take of the cluster, and how dear that is while more is asked for than there is.

asked for in the last 30 s ─► worker-seconds of prefill, of decode steps, of pages that each would take
given in that time by the workers, with what stands free now and less what they are behind
more asked than given ─► the excess of each is its price; who costs more than `limit` is refused: the cheapest are taken, as many as fit
Who takes ten times as much displaces ten others, so with everybody of equal value this serves most. It is bid-price control (Talluri and
van Ryzin, The Theory and Practice of Revenue Management, 2004, chapter 3), with the last half minute for a forecast of demand.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..placement import Choice, PlacementRequest, Slo, Snapshot
from ..policies.base import choice_blocks
from ..predictors.timing import Predictors
from ..predictors.waiting import queue_s
from .base import decode_role

LEAST_S = 10.0  # of history, before anything has a price
LEAST_GIVEN = 1e-9  # worker-seconds; a pool that is behind by all it could give, and more


class Take(NamedTuple):
    """Worker-seconds that a request takes, or that there are; or a price of each."""

    prefill: float
    steps: float
    pages: float


FREE = Take(0.0, 0.0, 0.0)


@dataclass(slots=True)
class BidPrice:
    """
    Args:
        horizon_s: what was asked for in this time will be asked for in as much.
        share: of decode steps, and of the TTFT SLO in prefill queues, that is given away: load comes unevenly, and a step too long is too
            long for its whole batch. Pages are given away all: who finds none waits.
        every_s: between two looks at the cluster.
    """

    predictors: Predictors
    horizon_s: float = 30.0
    share: float = 0.8
    every_s: float = 1.0
    prices: Take = FREE
    limit: float = math.inf
    _asked: deque[tuple[float, Take]] = field(default_factory=deque)
    _begun_s: float = math.nan
    _next_s: float = -math.inf

    def ask(self, request: PlacementRequest, choice: Choice, snapshot: Snapshot, slo: Slo, decode_s: float, mean_s: float) -> bool:
        """Notes what the request would take; whether it is too dear now. A step of priority doubles or halves what it costs.

        slo: what the cluster is to keep; decode_s: seconds that this request will decode; mean_s: that requests do, on average.
        """
        take = self.take(request, choice, snapshot, slo, decode_s)
        if not self._asked:
            self._begun_s = snapshot.now_s
        self._asked.append((snapshot.now_s, take))
        if snapshot.now_s >= self._next_s:
            self._next_s = snapshot.now_s + self.every_s
            self._look(snapshot, slo, mean_s)
        return self.cost(take) * 2.0**request.priority > self.limit

    def cost(self, take: Take) -> float:
        prices = self.prices
        return prices.prefill * take.prefill + prices.steps * take.steps + prices.pages * take.pages

    def take(self, request: PlacementRequest, choice: Choice, snapshot: Snapshot, slo: Slo, decode_s: float) -> Take:
        num_cached = choice_blocks(request, choice, snapshot.block_size) * snapshot.block_size
        prefill_s = self.predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
        steps_s = self._of_a_step(1, request.num_tokens, slo) * decode_s
        capacity = choice.decode.kv_capacity_tokens
        pages_s = request.num_tokens / capacity * decode_s if capacity else 0.0
        if _one_pool(snapshot):
            return Take(prefill_s + max(steps_s, pages_s), 0.0, 0.0)
        return Take(prefill_s, steps_s, pages_s)

    def _of_a_step(self, num_sequences: int, num_tokens: int, slo: Slo) -> float:
        """Share of what may come on top of one worker's empty step."""
        step = self.predictors.step
        room_s = max(slo.tpot_s - step.base_s, 0.1 * step.base_s) * self.share
        return (num_sequences * step.per_sequence_s + num_tokens * step.per_kv_token_s) / room_s

    def _look(self, snapshot: Snapshot, slo: Slo, mean_s: float) -> None:
        """Sets the prices, and the limit."""
        asked = self._asked
        while asked[0][0] < snapshot.now_s - self.horizon_s:
            asked.popleft()
        span_s = min(self.horizon_s, snapshot.now_s - self._begun_s)
        if span_s < LEAST_S:
            return
        given = [max(there, LEAST_GIVEN) for there in self.given(snapshot, slo, span_s, mean_s)]
        takes = [take for _, take in asked]
        loads = [sum(taken) / there for taken, there in zip(zip(*takes, strict=True), given, strict=True)]
        self.prices = Take(*(max(load - 1.0, 0.0) / there for load, there in zip(loads, given, strict=True)))
        self.limit = math.inf if self.prices == FREE else self._dearest(takes, given)

    def _dearest(self, takes: list[Take], given: list[float]) -> float:
        """The cost up to which all together take no more than is given."""
        prefill, steps, pages = given
        dearest = 0.0
        for cost, take in sorted((self.cost(take), take) for take in takes):
            prefill, steps, pages = prefill - take.prefill, steps - take.steps, pages - take.pages
            if prefill < 0.0 or steps < 0.0 or pages < 0.0:
                break
            dearest = cost
        return dearest

    def given(self, snapshot: Snapshot, slo: Slo, span_s: float, mean_s: float) -> Take:
        """What the workers can do in span_s of what comes: as much more as is free now, as much less as they are behind."""
        prefill = [member for member in snapshot.prefill if member.role != "decode"] or snapshot.prefill
        decode = decode_role(snapshot)
        queued_s = sum(queue_s(self.predictors, member, snapshot.now_s) for member in prefill)
        queue_room_s = len(prefill) * self.share * slo.ttft_s - queued_s
        stepping = sum(self._of_a_step(member.num_requests, member.num_outstanding_tokens, slo) for member in decode)
        capacity = sum(member.kv_capacity_tokens for member in decode)
        paged = sum(member.num_outstanding_tokens for member in decode) / capacity * len(decode) if capacity else 0.0
        if _one_pool(snapshot):
            return Take(len(snapshot.decode) * span_s + queue_room_s + (len(decode) - max(stepping, paged)) * mean_s, math.inf, math.inf)
        decoding_s = len(decode) * span_s
        return Take(
            len(prefill) * span_s + queue_room_s,
            decoding_s + (len(decode) - stepping) * mean_s,
            decoding_s + (len(decode) - paged) * mean_s,
        )


def _one_pool(snapshot: Snapshot) -> bool:
    """Workers that prefill and workers that decode are the same, or may change places."""
    return any(member.role not in ("decode", "") for member in snapshot.decode)
