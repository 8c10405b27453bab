"""What a request would take of the cluster, and how dear that is while more is asked for than there is.

asked for in the last 30 s ─► worker-seconds of prefill, of decode steps, of pages that each would take
given in that time by the workers, with what stands free now and less what they are behind
more asked than given ─► the excess of each is its price; who costs more than `limit` is refused: the cheapest are taken, as many as fit
Who takes ten times as much displaces ten others, so with everybody of equal value this serves most. It is bid-price control (Talluri and
van Ryzin, The Theory and Practice of Revenue Management, 2004, chapter 3), with the last half minute for a forecast of demand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..placement import PlacementRequest, Selection, Slo, Snapshot
from ..policies.base import selected_blocks
from ..pool import Floats, Ints, total
from ..predictors.timing import Predictors
from ..predictors.waiting import queue_times
from .base import decode_role

LEAST_S = 10.0  # of history, before anything has a price
LEAST_GIVEN = 1e-9  # worker-seconds; a pool that is behind by all it could give, and more
PRIORITY_STEPS = 8  # that count, either way: no priority makes a request free, and none bars it while it takes next to nothing


class Take(NamedTuple):
    """Worker-seconds that a request takes, or that there are; or a price of each."""

    prefill: float
    steps: float
    pages: float


FREE = Take(0.0, 0.0, 0.0)


class Asked:
    """When each of the last requests came, and what it would take, by time."""

    def __init__(self) -> None:
        self._rows: Floats = np.zeros((64, 4))
        self._first = self._end = 0

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def rows(self) -> Floats:
        """[requests, (moment, prefill, steps, pages)]. A view, valid until the next add."""
        return self._rows[self._first : self._end]

    def add(self, moment_s: float, take: Take) -> None:
        if self._end == len(self._rows):
            kept = self.rows
            self._rows = np.zeros((max(64, 2 * len(kept)), 4))
            self._rows[: len(kept)] = kept
            self._first, self._end = 0, len(kept)
        self._rows[self._end] = (moment_s, *take)
        self._end += 1

    def forget_before(self, moment_s: float) -> None:
        self._first += int(np.searchsorted(self.rows[:, 0], moment_s))


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
    asked: Asked = field(default_factory=Asked)
    _begun_s: float = math.nan
    _next_s: float = -math.inf

    def ask(self, request: PlacementRequest, selection: Selection, snapshot: Snapshot, slo: Slo, decode_s: float, mean_s: float) -> bool:
        """Notes what the request would take; whether it is too dear now.

        slo: what the cluster is to keep; decode_s: seconds that this request will decode; mean_s: that requests do, on average.
        """
        take = self.take(request, selection, snapshot, slo, decode_s)
        if not len(self.asked):
            self._begun_s = snapshot.now_s
        self.asked.add(snapshot.now_s, take)
        if snapshot.now_s >= self._next_s:
            self._next_s = snapshot.now_s + self.every_s
            self._look(snapshot, slo, mean_s)
        return self.cost(take) * self.weight(request.priority) > self.limit

    @staticmethod
    def weight(priority: int) -> float:
        """A step of priority doubles or halves what a request costs, up to PRIORITY_STEPS either way."""
        return 2.0 ** min(max(priority, -PRIORITY_STEPS), PRIORITY_STEPS)

    def cost(self, take: Take) -> float:
        prices = self.prices
        return prices.prefill * take.prefill + prices.steps * take.steps + prices.pages * take.pages

    def take(self, request: PlacementRequest, selection: Selection, snapshot: Snapshot, slo: Slo, decode_s: float) -> Take:
        num_cached = selected_blocks(request, selection, snapshot.block_size) * snapshot.block_size
        prefill_s = self.predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
        steps_s = self._of_a_step(1, request.num_tokens, slo) * decode_s
        capacity = selection.decode.kv_capacity_tokens
        pages_s = request.num_tokens / capacity * decode_s if capacity else 0.0
        if _one_pool(snapshot):
            return Take(prefill_s + max(steps_s, pages_s), 0.0, 0.0)
        return Take(prefill_s, steps_s, pages_s)

    def _of_a_step(self, num_sequences: int, num_tokens: int, slo: Slo) -> float:
        """Share of what may come on top of one worker's empty step."""
        step = self.predictors.step
        return (num_sequences * step.per_sequence_s + num_tokens * step.per_kv_token_s) / self._room_s(slo)

    def _of_steps(self, num_sequences: Ints, num_tokens: Ints, slo: Slo) -> Floats:
        """The same of many workers."""
        step = self.predictors.step
        return (num_sequences * step.per_sequence_s + num_tokens * step.per_kv_token_s) / self._room_s(slo)

    def _room_s(self, slo: Slo) -> float:
        base_s = self.predictors.step.base_s
        return max(slo.tpot_s - base_s, 0.1 * base_s) * self.share

    def _look(self, snapshot: Snapshot, slo: Slo, mean_s: float) -> None:
        """Sets the prices, and the limit."""
        self.asked.forget_before(snapshot.now_s - self.horizon_s)
        span_s = min(self.horizon_s, snapshot.now_s - self._begun_s)
        if span_s < LEAST_S:
            return
        given = [max(there, LEAST_GIVEN) for there in self.given(snapshot, slo, span_s, mean_s)]
        takes = self.asked.rows[:, 1:]
        loads = [total(takes[:, at]) / there for at, there in enumerate(given)]
        self.prices = Take(*(max(load - 1.0, 0.0) / there for load, there in zip(loads, given, strict=True)))
        self.limit = math.inf if self.prices == FREE else self._dearest(takes, given)

    def _dearest(self, takes: Floats, given: list[float]) -> float:
        """The cost up to which all together take no more than is given. takes: [requests, 3]."""
        prefill, steps, pages = takes.T
        costs = self.prices.prefill * prefill + self.prices.steps * steps + self.prices.pages * pages
        cheapest_first = np.lexsort((pages, steps, prefill, costs))
        left = np.subtract.accumulate(np.vstack((given, takes[cheapest_first])))[1:]
        over = np.flatnonzero((left < 0.0).any(axis=1))
        num_served = int(over[0]) if len(over) else len(takes)
        return float(costs[cheapest_first[num_served - 1]]) if num_served else 0.0

    def given(self, snapshot: Snapshot, slo: Slo, span_s: float, mean_s: float) -> Take:
        """What the workers can do in span_s of what comes: as much more as is free now, as much less as they are behind."""
        prefill = snapshot.prefill.without_role("decode")
        prefill = prefill if len(prefill) else snapshot.prefill
        decode = decode_role(snapshot)
        queue_room_s = len(prefill) * self.share * slo.ttft_s - total(
            queue_times(self.predictors, prefill, snapshot.now_s) + prefill.behind_s
        )
        stepping = total(self._of_steps(decode.num_requests, decode.num_outstanding_tokens, slo))
        capacity = int(decode.kv_capacity_tokens.sum())
        paged = int(decode.num_outstanding_tokens.sum()) / capacity * len(decode) if capacity else 0.0
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
    return not snapshot.decode.roster.role_names <= {"decode", ""}
