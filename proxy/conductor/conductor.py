"""The Conductor: which prefill and which decode worker take a request. A pure function of a snapshot.

Snapshot ──► candidates: not excluded, large enough ──► policy.select ──► forecast ──► admission.judge ──► Placement
                 └─ none ──► Rejection                                                     └─ over the SLO ──► Rejection
Where decode workers prefill (no prefill worker lives, no live store takes the hand-off, or always), the policy selects one of them for
both legs. A policy that weighs local prefill is shown both kinds.
No I/O, no clock, and no import of grpc, torch or ray: the proxy and the simulator run this very object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from .admission.base import Admission
from .forecast import forecast
from .member_state import MemberState
from .placement import NO_VERDICTS, Placement, PlacementRequest, Rejection, Selection, Snapshot, SsdVerdict
from .policies import Policy, selected_blocks
from .policies.base import cached_blocks
from .policies.prefix_cost import fetch_pays, weigh
from .pool import Pool
from .predictors.timing import Predictors
from .turn import with_turns


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
        request = self.weigh(request, snapshot.block_size)
        prefill, why_local = self._prefill_candidates(request, snapshot)
        if isinstance(prefill, Rejection):
            return prefill
        decode = _candidates("decode", snapshot.decode, request)
        if isinstance(decode, Rejection):
            return decode
        snapshot = dataclasses.replace(snapshot, prefill=_with_held(prefill, request), decode=decode)
        selection = self.policy.select(request, snapshot)
        if why_local:
            selection = _local(selection, why_local)
        elif self.local_prefill != "never" and selection.prefill.id == selection.decode.id and selection.prefix is not None:
            selection = selection._replace(prefix=None, ttft_s=None)  # a decode worker loads from its own store alone
        selection = self._without_slow_fetch(request, selection, snapshot.block_size)
        verdicts = _verdicts(request, selection)
        ttft_s = tpot_s = promised_s = None
        exposed_s = 0.0
        if self.predictors is not None:
            num_cached = selected_blocks(request, selection, snapshot.block_size) * snapshot.block_size
            selection = selection._replace(prefill=with_turns(self.predictors, request, selection.prefill, num_cached, snapshot))
            predicted = forecast(self.predictors, request, selection, snapshot)
            ttft_s, tpot_s, exposed_s, promised_s = predicted.ttft_s, predicted.tpot_s, predicted.exposed_s, predicted.promised_s
            predicted = predicted._replace(ttft_s=ttft_s + request.waited_s)
            admission = None if request.admitted else self.admission
            rejection = admission.judge(request, selection, predicted, snapshot) if admission is not None else None
            if rejection is not None:
                return dataclasses.replace(rejection, ttft_s=ttft_s, tpot_s=tpot_s)
        return Placement(
            prefill=selection.prefill,
            decode=selection.decode,
            prefix=selection.prefix,
            num_cached_tokens=selected_blocks(request, selection, snapshot.block_size) * snapshot.block_size,
            reason="; ".join([f"{self.policy.name}: {selection.reason}", *(f"{store}: {one}" for store, one in verdicts.items())]),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            ssd_verdicts=verdicts,
            exposed_s=exposed_s,
            promised_ttft_s=promised_s,
        )

    def weigh(self, request: PlacementRequest, block_size: int) -> PlacementRequest:
        """Without the blocks on SSD that are computed sooner than loaded, where times are predicted. place() does the same."""
        return request if self.predictors is None else weigh(self.predictors, request, block_size)

    def _without_slow_fetch(self, request: PlacementRequest, selection: Selection, block_size: int) -> Selection:
        """A policy that predicts nothing may want a prefix that is computed sooner than fetched."""
        prefix = selection.prefix
        if prefix is None or self.predictors is None:
            return selection
        own = cached_blocks(request, selection.prefill, block_size)
        if fetch_pays(self.predictors, request, prefix.store_address, own, prefix.num_blocks, block_size):
            return selection
        reason = f"{selection.reason}; no: computing them is faster than fetching them"
        return selection._replace(prefix=None, ttft_s=None, reason=reason)

    def observe_arrival(self, request: PlacementRequest, snapshot: Snapshot, answer: Placement | Rejection) -> None:
        """To be told once for each time that a prompt is to be computed: the snapshot that it was placed on, and the answer."""
        placed = isinstance(answer, Placement)
        if self.policy.roles is not None and (placed or answer.code == "overloaded"):
            self.policy.roles.observe_arrival(request, snapshot)
        if placed and self.predictors is not None:
            num_new = request.num_tokens - answer.num_cached_tokens
            work_s = self.predictors.prefill.predict(num_new, answer.num_cached_tokens)
            self.predictors.passing.observe(snapshot.now_s, work_s, num_new, request.passed_until_s - snapshot.now_s)

    def _prefill_candidates(self, request: PlacementRequest, snapshot: Snapshot) -> tuple[Pool | Rejection, str]:
        """And why they are decode workers, where they are; else ""."""
        if self.local_prefill == "always":
            return _candidates("decode", snapshot.decode, request), "local prefill is set to always"
        no_handoff = _no_handoff(request, snapshot)
        if no_handoff is not None:
            if self.local_prefill == "never":
                return no_handoff, ""
            return _candidates("decode", snapshot.decode, request), "no live store takes a hand-off of it"
        candidates = _candidates("prefill", snapshot.prefill, request)
        if snapshot.prefill is snapshot.decode:  # everybody is a candidate for both already
            return candidates, ""
        if self.local_prefill == "fallback" and isinstance(candidates, Rejection) and candidates.code == "no_worker":
            return _candidates("decode", snapshot.decode, request), "no prefill worker is alive"
        if self.local_prefill == "fallback" and self.policy.weighs_local and not isinstance(candidates, Rejection):
            local = _candidates("decode", snapshot.decode.with_role("decode"), request)
            if not isinstance(local, Rejection):
                candidates = _with_held(candidates, request).join(_with_held(local, request))
        return candidates, ""


def _no_handoff(request: PlacementRequest, snapshot: Snapshot) -> Rejection | None:
    """None where a live store takes the request's hand-off."""
    num_tokens, limit = request.num_tokens, snapshot.max_handoff_len
    if num_tokens <= limit:
        return None
    if not limit:
        return Rejection("no_worker", "there is no live KV store that a hand-off could lie in; start one or wait for a restart")
    advice = "shorten the prompt, raise store.arena_bytes or allow proxy.local_prefill"
    return Rejection("prompt_too_long", f"{num_tokens} tokens fit no KV store; the largest takes a hand-off of {limit}; {advice}")


def _verdicts(request: PlacementRequest, selection: Selection) -> Mapping[str, SsdVerdict]:
    """Of the stores that the selected prefill worker asks for the prefix."""
    if not request.ssd_verdicts:
        return NO_VERDICTS
    asked = [selection.prefill.store_address, selection.prefix.store_address if selection.prefix is not None else ""]
    return {store: verdict for store in asked if (verdict := request.ssd_verdicts.get(store)) is not None}


def _with_held(pool: Pool, request: PlacementRequest) -> Pool:
    return pool.with_held(request.held_blocks, request.page_blocks)


def _local(selection: Selection, why: str) -> Selection:
    """The worker selected for the prefill decodes, too. It loads from its own store alone; the policy did not predict that."""
    member: MemberState = selection.prefill
    return Selection(member, member, f"{member.id} computes the prompt itself, for {why}")


def _candidates(role: str, pool: Pool, request: PlacementRequest) -> Pool | Rejection:
    """The pool itself where nobody is left out, which is so for almost every request."""
    live = pool.without(request.exclude) if request.exclude else pool
    if not len(live):
        but = f" but the {len(pool)} that failed this request" if len(pool) else ""
        return Rejection("no_worker", f"there is no live {role} worker{but}; start one or wait for a restart")
    num_tokens, capacity = request.num_tokens, live.kv_capacity_tokens
    large = live.keep((capacity <= 0) | (capacity >= num_tokens))
    if not len(large):
        return Rejection(
            "prompt_too_long",
            f"{num_tokens} tokens do not fit any {role} worker; the largest holds {capacity.max()}; shorten the prompt",
        )
    unsuspected = large.without(request.avoid) if request.avoid else large
    return unsuspected if len(unsuspected) else large
