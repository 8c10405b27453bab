"""cache_aware: where the prompt's last token is computed soonest, counted in tokens to compute.

cost(prefill worker) = tokens ahead of the request + tokens of it that the worker's own store does not hold
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..placement import Choice, MemberState, PlacementRequest, PrefixHint, Snapshot
from .base import cached_blocks, least_outstanding, usable_blocks


@dataclass(slots=True)
class CacheAware:
    name: ClassVar[str] = "cache_aware"

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        block_size = candidates.block_size

        def cost(member: MemberState) -> tuple[int, int, str]:
            num_cached = cached_blocks(request, member, block_size) * block_size
            return member.num_outstanding_tokens + request.num_tokens - num_cached, -num_cached, member.id

        prefill = min(candidates.prefill, key=cost)
        decode = least_outstanding(candidates.decode)
        num_own = cached_blocks(request, prefill, block_size)
        prefix = _longer_elsewhere(request, prefill, num_own, block_size)
        reason = (
            f"{prefill.id} has {num_own * block_size} of {request.num_tokens} tokens cached and {prefill.num_outstanding_tokens} ahead, "
            f"{decode.id} holds the least ({decode.num_outstanding_tokens})"
        )
        if prefix is not None:
            reason += f"; {prefix.num_blocks * block_size} tokens come from {prefix.store_address}"
        return Choice(prefill, decode, reason, prefix)


def _longer_elsewhere(request: PlacementRequest, prefill: MemberState, num_own: int, block_size: int) -> PrefixHint | None:
    best = max(request.held_blocks.items(), key=lambda held: (held[1], held[0]), default=None)
    if best is None or best[0] == prefill.store_address:
        return None
    num_blocks = usable_blocks(request, best[1], block_size)
    return PrefixHint(best[0], num_blocks) if num_blocks > num_own else None
