"""What the requests of the last while would have got from another division of the workers: the share of them inside their SLO.

Form: k workers prefill for the others, the rest decode, and prefill for themselves beside it. k = 0 is a coupled cluster, and with
nothing prefilled locally every k is a static split.

arrivals of late ─► each form: the queue that would have given the first token soonest ─► first tokens in time
decode demand    ─► each form: the batch of a worker that decodes ─► its step, its pages, and how much slower a prompt is beside it
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...protocol.timing.chunk_sizer import MARGIN
from .placement import Slo
from .predictors.timing import Predictors
from .predictors.waiting import slowdowns_beside

SCALES = (1.0, 1.25, 1.6)  # of the load, so that of forms that all hold the one with the most to spare is known


class Arrival(NamedTuple):
    at_s: float
    prefill_s: float  # of its prompt, alone


@dataclass(frozen=True, slots=True)
class Demand:
    arrivals: Sequence[Arrival]  # by time
    tokens_per_s: float  # of answers
    num_running: int  # sequences
    context_len: float  # of a sequence, mean


class Batch(NamedTuple):
    """Of one worker that decodes."""

    share: float  # of its sequences that it has time and pages for, at most 1
    slowdown: float  # of a prompt beside it; inf: it takes none
    rest_s: float  # that such a prompt waits for the step under way and the rest of its last one, and that its calls take


@dataclass(frozen=True, slots=True)
class WhatIf:
    """
    Args:
        slo: finite.
        capacity_len: tokens in a worker's pages; 0: enough.
        handoff_s: from the end of a prefill to the first token on another worker.
        least_slack: of a step, that has to be free on a worker that decodes for it to take prompts while others prefill.
        most_beside: tokens of chunks beside decode tokens.
    """

    predictors: Predictors
    slo: Slo
    num_workers: int
    capacity_len: int
    handoff_s: float
    least_slack: float
    most_beside: int

    def score(self, demand: Demand, num_prefill: int) -> float:
        """Mean share in time, over SCALES."""
        return sum(self.share(demand, num_prefill, scale) for scale in SCALES) / len(SCALES)

    def share(self, demand: Demand, num_prefill: int, scale: float) -> float:
        batch = self.batch(demand, num_prefill, scale)
        return batch.share**2 * self._in_time(demand.arrivals, num_prefill, scale, batch)

    def batch(self, demand: Demand, num_prefill: int, scale: float) -> Batch:
        """Of each worker that decodes, at the larger of the demand that is there and the demand that comes."""
        num_decode, target_s, step = self.num_workers - num_prefill, MARGIN * self.slo.tpot_s, self.predictors.step
        each_s = step.per_sequence_s + step.per_kv_token_s * demand.context_len
        tokens_per_s, there = scale * demand.tokens_per_s / num_decode, scale * demand.num_running / num_decode
        room_s = max(target_s - step.base_s, 0.05 * target_s)
        wanted = max(there, tokens_per_s * target_s)  # in a step of the target's length
        share = min(1.0, room_s / max(wanted * each_s, 1e-12))
        if self.capacity_len:
            busy = min(tokens_per_s * each_s, 0.99)
            step_s = min(step.base_s / (1.0 - busy), target_s)
            share = min(share, 0.9 * self.capacity_len / max(max(there, tokens_per_s * step_s) * demand.context_len, 1.0))
        slack_s = target_s - step.base_s - wanted * each_s
        if num_prefill and slack_s < self.least_slack * target_s:
            return Batch(share, math.inf, 0.0)
        size = np.array([wanted])
        slowdown = float(slowdowns_beside(step.cost, size, size * demand.context_len, target_s, 0, self.most_beside)[0])
        return Batch(share, slowdown, min(wanted, 1.0) * target_s + self.predictors.model.request_s)

    def _in_time(self, prompts: Sequence[Arrival], num_prefill: int, scale: float, batch: Batch) -> float:
        free = [0.0] * num_prefill  # when each worker's queue is computed
        local = [0.0] * (self.num_workers - num_prefill) if math.isfinite(batch.slowdown) else []
        first_s, limit_s, num_in_time = prompts[0][0], self.slo.ttft_s, 0
        for at_s, prefill_s in prompts:
            now_s = (at_s - first_s) / scale
            there_s = max(free[0], now_s) + prefill_s if free else math.inf
            here_s = max(local[0], now_s) + prefill_s * batch.slowdown if local else math.inf
            if here_s + batch.rest_s <= there_s + self.handoff_s:
                heapq.heapreplace(local, here_s)
                num_in_time += here_s + batch.rest_s - now_s <= limit_s
            else:
                heapq.heapreplace(free, there_s)
                num_in_time += there_s + self.handoff_s - now_s <= limit_s
        return num_in_time / len(prompts)
