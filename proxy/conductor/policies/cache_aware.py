"""cache_aware: where the prompt's last token is computed soonest, counted in tokens to compute.

cost(prefill worker) = tokens ahead of the request + tokens of it that neither its pages nor its own store hold
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from ..member_state import MemberState
from ..placement import PlacementRequest, PrefixHint, Selection, Snapshot
from .base import Policy, PolicySettings, least_outstanding, own_blocks, usable_blocks


@dataclass(slots=True)
class CacheAware(Policy):
    name: ClassVar[str] = "cache_aware"
    fetches: ClassVar[bool] = True

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls()

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        block_size, pool = candidates.block_size, candidates.prefill
        own = own_blocks(request, pool, block_size)
        costs = pool.num_outstanding_tokens - own.held * block_size
        # of equal costs the one with the most cached, most of it in its pages, and of those the first id
        row = pool.least(np.where(costs == costs.min(), -own.ranks, 1))
        prefill, num_own = pool[row], int(own.held[row])
        decode = least_outstanding(candidates.decode)
        prefix = _longer_elsewhere(request, prefill, num_own, block_size)
        reason = (
            f"{prefill.id} has {num_own * block_size} of {request.num_tokens} tokens cached and {prefill.num_outstanding_tokens} ahead, "
            f"{decode.id} holds the least ({decode.num_outstanding_tokens})"
        )
        if prefix is not None:
            reason += f"; {prefix.num_blocks * block_size} tokens come from {prefix.store_address}"
        return Selection(prefill, decode, reason, prefix)


def _longer_elsewhere(request: PlacementRequest, prefill: MemberState, num_own: int, block_size: int) -> PrefixHint | None:
    held = request.held_blocks
    if not held:
        return None
    most = max(held.values())
    num_blocks = usable_blocks(request, most, block_size)
    if num_blocks <= num_own:
        return None
    best = max([store for store, found in held.items() if found == most])
    return PrefixHint(best, num_blocks) if best != prefill.store_address else None
