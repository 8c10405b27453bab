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
from typing import ClassVar

from ..placement import Choice, MemberState, PlacementRequest, PrefixHint, Snapshot
from ..predictors.timing import Predictors
from ..predictors.waiting import least_step, queue_s, step_with
from .base import usable_blocks


@dataclass(slots=True)
class KvcacheCentric:
    predictors: Predictors
    balancing_threshold: float = 1.0
    name: ClassVar[str] = "kvcache_centric"

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        holder, best = best_prefix(request, candidates.block_size)
        times: dict[int, tuple[float, int]] = {}  # own blocks -> seconds beside the queue's, blocks in front of the prefill
        predictors, now_s, held = self.predictors, candidates.now_s, request.held_blocks
        chosen, chosen_s = candidates.prefill[0], math.inf
        for member in candidates.prefill:
            queued_s = queue_s(predictors, member, now_s)
            if queued_s >= chosen_s:  # in its queue alone; most of a large cluster ends here
                continue
            own = min(held.get(member.store_address, 0), best)
            found = times.get(own)
            if found is None:
                found = times[own] = self._compute_s(request, own, best, candidates.block_size)
            ttft_s = queued_s + found[0]
            if ttft_s < chosen_s:
                chosen, chosen_s = member, ttft_s
        own = min(held.get(chosen.store_address, 0), best)
        used = times[own][1]
        decode, tpot_s = self.select_decode(request, candidates)
        prefix = PrefixHint(holder, used) if used > own else None
        reason = f"{chosen.id} is predicted to give the first token in {chosen_s:.3f} s behind {used * candidates.block_size} cached tokens"
        if prefix is not None:
            reason += f", of which {(used - own) * candidates.block_size} come from {holder}"
        return Choice(chosen, decode, f"{reason}; {decode.id} would step in {tpot_s * 1e3:.0f} ms", prefix, chosen_s, tpot_s)

    def select_decode(self, request: PlacementRequest, candidates: Snapshot) -> tuple[MemberState, float]:
        """The least predicted step, what is promised to the worker included; ties go to the first. And its step as it runs now."""
        chosen = least_step(self.predictors, candidates.decode)
        return chosen, step_with(self.predictors, chosen, request.num_tokens)

    def _compute_s(self, request: PlacementRequest, own: int, best: int, block_size: int) -> tuple[float, int]:
        """Seconds of transfer and prefill on a worker that holds own blocks, and the blocks it then starts behind."""
        block_bytes, transfer = block_size * self.predictors.model.kv_bytes_per_token, self.predictors.transfer
        used, transfer_s = own, transfer.own(own * block_bytes)
        ratio = best / own if own else math.inf
        if best > own and ratio > self.balancing_threshold:
            used = best
            transfer_s += transfer.predict((best - own) * block_bytes)
        num_cached = used * block_size
        return transfer_s + self.predictors.prefill.predict(request.num_tokens - num_cached, num_cached), used


def best_prefix(request: PlacementRequest, block_size: int) -> tuple[str, int]:
    """The store with the longest usable prefix (the first by address among equals), and its length in blocks."""
    if not request.held_blocks:
        return "", 0
    store, num_blocks = min(request.held_blocks.items(), key=lambda held: (-held[1], held[0]))
    return store, usable_blocks(request, num_blocks, block_size)
