"""adaptive: predicted milliseconds decide where a request is prefilled, where it decodes, and how many workers do which.

prefill   the worker with the least predicted first token, as in kvcache_centric; a decode worker counts too, slowed by the batch that
          shares its steps, while its step and its pages have slack. A prefill there is chunked so that no step passes the target.
decode    the least predicted step among those in the decode role; chosen when the prefill begins, not when the request arrives.
roles     rebalance(): as many decode workers as hold the load under the SLO and inside their pages, all others prefill. A worker that
          changes takes no new work of the old kind and keeps what it has, its cache included.
It is told the SLO and nothing of the best split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from ....protocol.timing.chunk_sizer import token_target_s
from ..member_state import MemberState
from ..placement import NO_SLO, PlacementRequest, PrefixHint, Selection, Slo, Snapshot
from ..pool import Bools, Floats, Pool
from ..predictors.timing import Predictors
from ..predictors.waiting import least_step, queue_s, queue_times, slowdowns_beside, step_with
from .base import Policy, PolicySettings, RoleChange, best_prefix, own_blocks

DEFAULT_TPOT_S = 0.05  # where the SLO bounds none: what workers then size their steps for
PEAK_FADE = 0.02  # of the distance to the present need, with every rebalance


@dataclass(slots=True)
class Adaptive(Policy):
    """
    Args:
        full_share: of the TBT SLO and of the pages that the decode pool is planned for.
        spare: decode workers' worth of load by which a worker has to be superfluous before it goes back to prefill.
        slack_share: a decode worker prefills while at least so much of a step is free.
    """

    predictors: Predictors
    slo: Slo = NO_SLO
    full_share: float = 0.90
    spare: float = 0.35
    slack_share: float = 0.4
    calm_s: float = 2.0  # from any change to one back to prefill
    last_change_s: float = -math.inf
    peak: float = 0.0  # decode workers needed, recently
    name: ClassVar[str] = "adaptive"
    fetches: ClassVar[bool] = True
    weighs_local: ClassVar[bool] = True
    plans_roles: ClassVar[bool] = True

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls(settings.predictors, settings.slo)

    @property
    def roles(self) -> Adaptive:
        return self

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        pool, block_size = candidates.prefill, candidates.block_size
        holder, best = best_prefix(request, block_size)
        own_of = own_blocks(request, pool, block_size)
        slowdowns, blocked = self._slowdowns(pool, request.num_tokens // 2)
        ttfts = queue_times(self.predictors, pool, candidates.now_s)
        ttfts += own_of.costs(lambda own, in_pages: self._compute_s(request, own, in_pages, max(best, own), block_size)) * slowdowns
        ttfts[blocked] = math.inf
        row = int(ttfts.argmin())  # ties go to the first
        prefill, ttft_s = pool[row], float(ttfts[row])
        local = prefill.role == "decode"
        decode, tpot_s = (
            (prefill, step_with(self.predictors, prefill, request.num_tokens)) if local else self.select_decode(request, candidates)
        )
        own = int(own_of.held[row])
        prefix = PrefixHint(holder, best) if best > own else None
        where = "in its own decode batch" if local else f"for {decode.id}"
        num_cached = max(best, own) * block_size
        reason = f"{prefill.id} is predicted to give the first token in {ttft_s:.3f} s {where}, behind {num_cached} cached tokens"
        return Selection(prefill, decode, reason, prefix, ttft_s, tpot_s)

    def select_decode(self, request: PlacementRequest, candidates: Snapshot) -> tuple[MemberState, float]:
        """The least predicted step among the decode role (anyone where nobody has it), promises included; and its step as it runs now."""
        pool = candidates.decode.with_role("decode")
        selected = least_step(self.predictors, pool if len(pool) else candidates.decode)
        return selected, step_with(self.predictors, selected, request.num_tokens)

    def rebalance(self, snapshot: Snapshot) -> tuple[RoleChange, ...]:
        """Who changes its role now. To be asked about once a second; snapshot.decode holds every worker."""
        now_s, members = snapshot.now_s, list(snapshot.decode)
        decoding = [member for member in members if member.role == "decode"]
        prefilling = [member for member in members if member.role != "decode"]
        needed = self.decode_workers_needed(members)
        self.peak = max(needed, self.peak - PEAK_FADE * max(self.peak - needed, 0.0))
        num_more = min(math.ceil(needed) - len(decoding), len(prefilling) - 1)
        if num_more > 0:
            changed = sorted(prefilling, key=lambda one: (queue_s(self.predictors, one, now_s), one.id))[:num_more]
            self.last_change_s = now_s
            return tuple(RoleChange(one.id, "decode", f"decode needs {needed:.1f} workers, {len(decoding)} do it") for one in changed)
        num_less = min(math.floor(len(decoding) - self.peak - self.spare), len(decoding) - 1)
        if num_less > 0 and now_s - self.last_change_s > self.calm_s:
            changed = sorted(decoding, key=lambda one: (one.num_requests, one.id))[:num_less]
            self.last_change_s = now_s
            return tuple(
                RoleChange(one.id, "prefill", f"decode needed {self.peak:.1f} workers of late, {len(decoding)} do it") for one in changed
            )
        return ()

    def decode_workers_needed(self, members: list[MemberState]) -> float:
        """So many that the sequences of all members, spread evenly, step under the SLO and fit into the pages."""
        step = self.predictors.step
        num_sequences = sum(member.num_running for member in members)
        num_tokens = sum(member.num_running_tokens for member in members)
        tpot_s = self.slo.tpot_s if math.isfinite(self.slo.tpot_s) else DEFAULT_TPOT_S
        room_s = max(self.full_share * tpot_s - step.base_s, 0.1 * step.base_s)
        by_time = (num_sequences * step.per_sequence_s + num_tokens * step.per_kv_token_s) / room_s
        capacity = members[0].kv_capacity_tokens
        return max(by_time, num_tokens / (self.full_share * capacity) if capacity else 0.0)

    def _compute_s(self, request: PlacementRequest, own: int, in_pages: int, best: int, block_size: int) -> float:
        """Seconds of transfer and prefill on a worker that holds own blocks, some in its pages; it fetches what another holds more."""
        block_bytes, transfer = block_size * self.predictors.model.kv_bytes_per_token, self.predictors.transfer
        transfer_s = transfer.own((own - in_pages) * block_bytes) + transfer.predict((best - own) * block_bytes)
        return transfer_s + self.predictors.prefill.predict(request.num_tokens - best * block_size, best * block_size)

    def _slowdowns(self, pool: Pool, num_prefix_tokens: int) -> tuple[Floats, Bools]:
        """Of a prefill on each worker, by the batch in its steps; and who should not have one. [workers] each.

        num_prefix_tokens: that a chunk of the prompt stands behind, on the average.
        """
        running = pool.num_running > 0
        if not running.any():
            return np.ones(len(pool)), running
        target_s = token_target_s(self.slo.tpot_s if math.isfinite(self.slo.tpot_s) else DEFAULT_TPOT_S, 0, 0.0)
        slack_s = target_s - self.predictors.step.predict_all(pool.num_running, pool.num_running_tokens)
        capacity = pool.kv_capacity_tokens
        full = (capacity > 0) & (pool.num_outstanding_tokens > self.full_share * capacity)
        blocked = running & pool.roster.in_role("decode") & ((slack_s < self.slack_share * target_s) | full)
        slowdowns = slowdowns_beside(self.predictors.step.cost, pool, target_s, num_prefix_tokens)
        return np.where(running, slowdowns, 1.0), blocked
