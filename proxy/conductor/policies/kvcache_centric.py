"""kvcache_centric: Mooncake's Algorithm 1 (FAST'25, section 4.1): the prefill worker with the least predicted TTFT.

for each prefill worker:  best / own > threshold ?  fetch the difference, then prefill behind best  :  prefill behind own
                          TTFT = T_queue + T_transfer + T_prefill
The paper leaves three things open. Chosen here: own = 0 counts as an infinite ratio (a prefix that is nowhere near is worth a
transfer; where best is 0 too there is nothing to move); the threshold is 1.0 by default, for a link of 87 GB/s moves a block forty
times faster than a node recomputes it; T_prefill is a + b·n + c·n·p + d·n².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from ..member_state import DECODES_ITS_OWN
from ..placement import PlacementRequest, PrefixHint, Selection, Snapshot
from ..pool import Floats, Pool
from ..predictors.timing import Predictors
from ..predictors.waiting import least_step, step_with, wait_times
from .base import Policy, PolicySettings, best_prefix, own_blocks
from .prefix_cost import fetch_pays, fetch_s, ssd_times

NEARLY = 1.1
NEARLY_S = 0.02


@dataclass(slots=True)
class KvcacheCentric(Policy):
    predictors: Predictors
    balancing_threshold: float = 1.0
    name: ClassVar[str] = "kvcache_centric"
    fetches: ClassVar[bool] = True

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls(settings.predictors, settings.balancing_threshold)

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        pool, block_size = candidates.prefill, candidates.block_size
        holder, best = best_prefix(request, block_size)
        own_of = own_blocks(request, pool, block_size)
        ttfts = wait_times(self.predictors, pool, candidates.now_s)
        ttfts += own_of.costs(lambda own, in_pages: self._compute_s(request, own, in_pages, holder, best, block_size))
        ttfts += ssd_times(self.predictors, request, pool, own_of, block_size)
        row = self._least(pool, ttfts)
        prefill, ttft_s, own = pool[row], float(ttfts[row]), int(own_of.held[row])
        used = self._used_blocks(request, own, holder, best, block_size)
        decode = least_step(self.predictors, candidates.decode)  # what is promised to the worker included
        tpot_s = step_with(self.predictors, decode, request.num_tokens)
        prefix = PrefixHint(holder, used) if used > own else None
        reason = f"{prefill.id} is predicted to give the first token in {ttft_s:.3f} s behind {used * block_size} cached tokens"
        if prefix is not None:
            reason += f", of which {(used - own) * block_size} come from {holder}"
        return Selection(prefill, decode, f"{reason}; {decode.id} would step in {tpot_s * 1e3:.0f} ms", prefix, ttft_s, tpot_s)

    def _least(self, pool: Pool, ttfts: Floats) -> int:
        """The worker with the least predicted first token; ties go to the first. Where who prefills decodes, too, nearly the least will do,
        and of those the one whose step is the shortest, promises included: idle queues would all else send everything to one."""
        least_s = float(ttfts.min())
        if not pool.roster.role_names <= DECODES_ITS_OWN:
            return int(ttfts.argmin())
        step_s = self.predictors.step.predict_all(pool.num_requests, pool.num_outstanding_tokens)
        return int(np.where(ttfts <= least_s * NEARLY + NEARLY_S, step_s, math.inf).argmin())

    def _used_blocks(self, request: PlacementRequest, own: int, holder: str, best: int, block_size: int) -> int:
        """Blocks that a worker with own blocks starts behind."""
        ratio = best / own if own else math.inf
        fetches = ratio > self.balancing_threshold and fetch_pays(self.predictors, request, holder, own, best, block_size)
        return best if fetches else own

    def _compute_s(self, request: PlacementRequest, own: int, in_pages: int, holder: str, best: int, block_size: int) -> float:
        """Seconds of transfer and prefill on a worker that holds own blocks, some of them in its pages."""
        block_bytes, transfer = block_size * self.predictors.model.kv_bytes_per_token, self.predictors.transfer
        used = self._used_blocks(request, own, holder, best, block_size)
        transfer_s = transfer.own((own - in_pages) * block_bytes)
        if used > own:
            transfer_s += fetch_s(self.predictors, request, holder, own, best, block_size)
        num_cached = used * block_size
        return transfer_s + self.predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
