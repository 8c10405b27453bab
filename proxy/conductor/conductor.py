"""The Conductor: which prefill and which decode worker take a request. A pure function of a snapshot.

Snapshot ──► candidates: not excluded, large enough ──► policy.choose ──► forecast ──► admission.judge ──► Placement
                 └─ none ──► Rejection                                                     └─ over the SLO ──► Rejection
Where decode workers prefill (no prefill worker lives, or always), the policy chooses among them for both legs at once; `adaptive` is
shown both kinds, for it weighs them against each other.
No I/O, no clock, and no import of grpc, torch or ray: the proxy and the simulator run this very object.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from .admission.base import Admission
from .forecast import forecast
from .placement import Choice, MemberState, Placement, PlacementRequest, Rejection, Snapshot
from .policies import Adaptive, Policy, choice_blocks
from .predictors.timing import Predictors


class Conductor:
    def __init__(
        self,
        policy: Policy,
        admission: Admission | None = None,
        predictors: Predictors | None = None,
        *,
        local_prefill: Literal["never", "fallback", "always"] = "never",
    ) -> None:
        """Without predictors nothing is predicted, and so nothing rejected for its SLO. Raises ValueError for an admission without."""
        if admission is not None and predictors is None:
            raise ValueError(f"admission {admission.name} judges predictions; give the conductor predictors")
        self.policy = policy
        self.admission = admission
        self.predictors = predictors
        self.local_prefill = local_prefill

    def place(self, request: PlacementRequest, snapshot: Snapshot) -> Placement | Rejection:
        prefill, why_local = self._prefill_candidates(request, snapshot)
        decode = _candidates("decode", snapshot.decode, request)
        for candidates in (prefill, decode):
            if isinstance(candidates, Rejection):
                return candidates
        assert not isinstance(prefill, Rejection) and not isinstance(decode, Rejection)
        if prefill is not snapshot.prefill or decode is not snapshot.decode:
            snapshot = dataclasses.replace(snapshot, prefill=prefill, decode=decode)
        choice = self.policy.choose(request, snapshot)
        if why_local:
            choice = _local(choice, why_local)
        elif self.local_prefill != "never" and choice.prefill.id == choice.decode.id and choice.prefix is not None:
            choice = choice._replace(prefix=None, ttft_s=None)  # a decode worker loads from its own store alone
        ttft_s = tpot_s = None
        if self.predictors is not None:
            ttft_s, tpot_s = predicted = forecast(self.predictors, request, choice, snapshot)
            predicted = predicted._replace(ttft_s=ttft_s + request.waited_s)
            admission = None if request.admitted else self.admission
            rejection = admission.judge(request, choice, predicted, snapshot) if admission is not None else None
            if rejection is not None:
                return dataclasses.replace(rejection, ttft_s=ttft_s, tpot_s=tpot_s)
        return Placement(
            prefill=choice.prefill,
            decode=choice.decode,
            prefix=choice.prefix,
            num_cached_tokens=choice_blocks(request, choice, snapshot.block_size) * snapshot.block_size,
            reason=f"{self.policy.name}: {choice.reason}",
            ttft_s=ttft_s,
            tpot_s=tpot_s,
        )

    def _prefill_candidates(self, request: PlacementRequest, snapshot: Snapshot) -> tuple[tuple[MemberState, ...] | Rejection, str]:
        """And why they are decode workers, where they are; else ""."""
        if self.local_prefill == "always":
            return _candidates("decode", snapshot.decode, request), "local prefill is set to always"
        candidates = _candidates("prefill", snapshot.prefill, request)
        if self.local_prefill == "fallback" and isinstance(candidates, Rejection) and candidates.code == "no_worker":
            return _candidates("decode", snapshot.decode, request), "no prefill worker is alive"
        if self.local_prefill == "fallback" and isinstance(self.policy, Adaptive) and not isinstance(candidates, Rejection):
            local = _candidates("decode", tuple(member for member in snapshot.decode if member.role == "decode"), request)
            return candidates if isinstance(local, Rejection) else candidates + local, ""  # it weighs them against each other
        return candidates, ""


def _local(choice: Choice, why: str) -> Choice:
    """The worker chosen for the prefill decodes, too; it loads from its own store alone. What was predicted is not predicted for that."""
    member = choice.prefill
    return Choice(member, member, f"{member.id} computes the prompt itself, for {why}")


def _candidates(role: str, members: tuple[MemberState, ...], request: PlacementRequest) -> tuple[MemberState, ...] | Rejection:
    """members itself where nobody is left out, which is so for almost every request."""
    live = members
    if request.exclude:
        live = tuple([member for member in members if member.incarnation not in request.exclude])
    if not live:
        but = f" but the {len(members)} that failed this request" if members else ""
        return Rejection("no_worker", f"there is no live {role} worker with a live store on its node{but}; start one or wait for a restart")
    num_tokens = request.num_tokens
    large = tuple([member for member in live if not 0 < member.kv_capacity_tokens < num_tokens])
    if not large:
        most = max(member.kv_capacity_tokens for member in live)
        return Rejection(
            "prompt_too_long", f"{num_tokens} tokens do not fit any {role} worker; the largest holds {most}; shorten the prompt"
        )
    if len(large) == len(members):
        large = members
    if not request.avoid:
        return large
    return tuple([member for member in large if member.incarnation not in request.avoid]) or large
