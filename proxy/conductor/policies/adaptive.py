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
from typing import ClassVar, Literal, NamedTuple

from ..placement import NO_SLO, Choice, MemberState, PlacementRequest, PrefixHint, Slo, Snapshot
from ..predictors.timing import Predictors
from ..predictors.waiting import least_step, queue_s, step_with
from .base import cached_blocks
from .kvcache_centric import best_prefix

DEFAULT_TPOT_S = 0.1  # where the SLO bounds none
PEAK_FADE = 0.02  # of the distance to the present need, with every rebalance


class RoleChange(NamedTuple):
    member_id: str
    role: Literal["prefill", "decode"]
    reason: str


@dataclass(slots=True)
class Adaptive:
    """
    Args:
        step_share: of the TBT SLO that a step with a prefill chunk may take.
        full_share: of the TBT SLO and of the pages that the decode pool is planned for.
        spare: decode workers' worth of load by which a worker has to be superfluous before it goes back to prefill.
        slack_share: a decode worker prefills while at least so much of a step is free.
    """

    predictors: Predictors
    slo: Slo = NO_SLO
    step_share: float = 0.92
    full_share: float = 0.90
    spare: float = 0.35
    slack_share: float = 0.4
    calm_s: float = 2.0  # from any change to one back to prefill
    last_change_s: float = -math.inf
    peak: float = 0.0  # decode workers needed, recently
    name: ClassVar[str] = "adaptive"

    @property
    def step_target_s(self) -> float:
        return self.step_share * (self.slo.tpot_s if math.isfinite(self.slo.tpot_s) else DEFAULT_TPOT_S)

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        block_size, predictors = candidates.block_size, self.predictors
        holder, best = best_prefix(request, block_size)
        times: dict[int, float] = {}
        target_s, now_s, held = self.step_target_s, candidates.now_s, request.held_blocks
        chosen, chosen_s = candidates.prefill[0], math.inf  # ties go to the first
        for member in candidates.prefill:
            queued_s = queue_s(predictors, member, now_s)
            if queued_s >= chosen_s:  # in its queue alone; most of a large cluster ends here
                continue
            slow = self._slowdown(member, target_s) if member.num_running else 1.0
            if slow == math.inf:
                continue
            own = min(held.get(member.store_address, 0), best)
            compute_s = times.get(own)
            if compute_s is None:
                block_bytes, transfer = block_size * predictors.model.kv_bytes_per_token, predictors.transfer
                rest = request.num_tokens - best * block_size
                moved_s = transfer.own(own * block_bytes) + transfer.predict((best - own) * block_bytes)
                compute_s = times[own] = moved_s + predictors.prefill.predict(rest, best * block_size)
            ttft_s = queued_s + compute_s * slow
            if ttft_s < chosen_s:
                chosen, chosen_s = member, ttft_s
        local = chosen.role == "decode"
        decode, tpot_s = (
            (chosen, step_with(self.predictors, chosen, request.num_tokens)) if local else self.select_decode(request, candidates)
        )
        prefix = PrefixHint(holder, best) if best > cached_blocks(request, chosen, block_size) else None
        where = "in its own decode batch" if local else f"for {decode.id}"
        reason = f"{chosen.id} is predicted to give the first token in {chosen_s:.3f} s {where}, behind {best * block_size} cached tokens"
        return Choice(chosen, decode, reason, prefix, chosen_s, tpot_s)

    def select_decode(self, request: PlacementRequest, candidates: Snapshot) -> tuple[MemberState, float]:
        """The least predicted step among the decode role (anyone where nobody has it), promises included; and its step as it runs now."""
        chosen = least_step(self.predictors, [member for member in candidates.decode if member.role == "decode"] or candidates.decode)
        return chosen, step_with(self.predictors, chosen, request.num_tokens)

    def rebalance(self, snapshot: Snapshot) -> tuple[RoleChange, ...]:
        """Who changes its role now. To be asked about once a second; snapshot.decode holds every worker."""
        now_s, members = snapshot.now_s, snapshot.decode
        decoding = [member for member in members if member.role == "decode"]
        prefilling = [member for member in members if member.role != "decode"]
        needed = self.decode_workers_needed(members)
        self.peak = max(needed, self.peak - PEAK_FADE * max(self.peak - needed, 0.0))
        num_more = min(math.ceil(needed) - len(decoding), len(prefilling) - 1)
        if num_more > 0:
            chosen = sorted(prefilling, key=lambda one: (queue_s(self.predictors, one, now_s), one.id))[:num_more]
            self.last_change_s = now_s
            return tuple(RoleChange(one.id, "decode", f"decode needs {needed:.1f} workers, {len(decoding)} do it") for one in chosen)
        num_less = min(math.floor(len(decoding) - self.peak - self.spare), len(decoding) - 1)
        if num_less > 0 and now_s - self.last_change_s > self.calm_s:
            chosen = sorted(decoding, key=lambda one: (one.num_requests, one.id))[:num_less]
            self.last_change_s = now_s
            return tuple(
                RoleChange(one.id, "prefill", f"decode needed {self.peak:.1f} workers of late, {len(decoding)} do it") for one in chosen
            )
        return ()

    def decode_workers_needed(self, members: tuple[MemberState, ...]) -> float:
        """So many that the sequences of all members, spread evenly, step under the SLO and fit into the pages."""
        step = self.predictors.step
        num_sequences = sum(member.num_running for member in members)
        num_tokens = sum(member.num_running_tokens for member in members)
        tpot_s = self.slo.tpot_s if math.isfinite(self.slo.tpot_s) else DEFAULT_TPOT_S
        room_s = max(self.full_share * tpot_s - step.base_s, 0.1 * step.base_s)
        by_time = (num_sequences * step.per_sequence_s + num_tokens * step.per_kv_token_s) / room_s
        capacity = members[0].kv_capacity_tokens
        return max(by_time, num_tokens / (self.full_share * capacity) if capacity else 0.0)

    def _slowdown(self, member: MemberState, target_s: float) -> float:
        """Of a prefill on the member, by the batch in its steps; inf where it should not have one."""
        slack_s = target_s - self.predictors.step.predict(member.num_running, member.num_running_tokens)
        full = member.kv_capacity_tokens and member.num_outstanding_tokens > self.full_share * member.kv_capacity_tokens
        if member.role == "decode" and (slack_s < self.slack_share * target_s or full):
            return math.inf
        return target_s / max(slack_s, 0.1 * target_s)
