"""The Conductor: which prefill and which decode worker take a request. A pure function of a snapshot.

Snapshot ──► candidates: not excluded, large enough ──► policy.choose ──► forecast ──► admission.judge ──► Placement
                 └─ none ──► Rejection                                                     └─ over the SLO ──► Rejection
No I/O, no clock, and no import of grpc, torch or ray: the proxy and the simulator run this very object.
"""

from __future__ import annotations

import dataclasses

from .admission.base import Admission
from .forecast import forecast
from .placement import MemberState, Placement, PlacementRequest, Rejection, Snapshot
from .policies import Policy, cached_blocks
from .predictors.timing import Predictors


class Conductor:
    def __init__(self, policy: Policy, admission: Admission | None = None, predictors: Predictors | None = None) -> None:
        """Without predictors nothing is predicted, and so nothing rejected for its SLO. Raises ValueError for an admission without."""
        if admission is not None and predictors is None:
            raise ValueError(f"admission {admission.name} judges predictions; give the conductor predictors")
        self.policy = policy
        self.admission = admission
        self.predictors = predictors

    def place(self, request: PlacementRequest, snapshot: Snapshot) -> Placement | Rejection:
        found: list[tuple[MemberState, ...]] = []
        for role, members in (("prefill", snapshot.prefill), ("decode", snapshot.decode)):
            candidates = _candidates(role, members, request)
            if isinstance(candidates, Rejection):
                return candidates
            found.append(candidates)
        snapshot = dataclasses.replace(snapshot, prefill=found[0], decode=found[1])
        choice = self.policy.choose(request, snapshot)
        ttft_s = tbt_s = None
        if self.predictors is not None:
            ttft_s, tbt_s = predicted = forecast(self.predictors, request, choice, snapshot)
            rejection = self.admission.judge(request, choice, predicted, snapshot) if self.admission is not None else None
            if rejection is not None:
                return rejection
        num_blocks = cached_blocks(request, choice.prefill, snapshot.block_size)
        if choice.prefix is not None:
            num_blocks = max(num_blocks, choice.prefix.num_blocks)
        return Placement(
            prefill=choice.prefill,
            decode=choice.decode,
            prefix=choice.prefix,
            num_cached_tokens=num_blocks * snapshot.block_size,
            reason=f"{self.policy.name}: {choice.reason}",
            ttft_s=ttft_s,
            tbt_s=tbt_s,
        )


def _candidates(role: str, members: tuple[MemberState, ...], request: PlacementRequest) -> tuple[MemberState, ...] | Rejection:
    live = tuple(member for member in members if member.incarnation not in request.exclude)
    if not live:
        but = f" but the {len(members)} that failed this request" if members else ""
        return Rejection("no_worker", f"there is no live {role} worker with a live store on its node{but}; start one or wait for a restart")
    large = tuple(member for member in live if member.kv_capacity_tokens == 0 or member.kv_capacity_tokens >= request.num_tokens)
    if not large:
        most = max(member.kv_capacity_tokens for member in live)
        return Rejection(
            "prompt_too_long", f"{request.num_tokens} tokens do not fit any {role} worker; the largest holds {most}; shorten the prompt"
        )
    return tuple(member for member in large if member.incarnation not in request.avoid) or large
