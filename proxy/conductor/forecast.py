"""What a selection of workers would mean for a request: predicted TTFT and time between tokens. What an admission judges."""

from __future__ import annotations

import math
from typing import NamedTuple

from .member_state import MemberState
from .placement import PlacementRequest, PrefixHint, Selection, Snapshot
from .policies.base import cached_blocks, page_blocks, selected_blocks
from .policies.prefix_cost import fetch_pays, fetched_ssd_s, own_ssd_s
from .predictors.first_token import Prompt, wait_for
from .predictors.timing import Predictors
from .predictors.waiting import step_with


class Forecast(NamedTuple):
    ttft_s: float  # from now
    tpot_s: float  # of the decode worker's step as it runs now, with the request in its batch
    exposed_s: float = 0.0  # of the TTFT, that others may pass it in
    later_s: float = 0.0  # than ttft_s, for one in ten; below 0 where even those come sooner

    @property
    def promised_s(self) -> float:
        return self.ttft_s + self.later_s


class PrefillForecast(NamedTuple):
    """A first token's parts on one prefill worker, in seconds from now."""

    queue_s: float
    transfer_s: float  # of the prefix, from its own store and from elsewhere; what stands in its pages needs none
    prefill_s: float  # what shares its steps included
    ssd_s: float  # stores' reads from SSD before the transfer
    exposed_s: float  # of queue and prefill, until nobody can pass it any more

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.transfer_s + self.prefill_s + self.ssd_s


def forecast(predictors: Predictors, request: PlacementRequest, selection: Selection, snapshot: Snapshot) -> Forecast:
    """A policy compares workers by what differs between them. Here the one that it selected is looked at closely, with its queue
    as the worker will arrange it (turn.py)."""
    parts = prefill_forecast(predictors, request, selection.prefill, selection.prefix, snapshot)
    ttft_s = parts.ttft_s
    if selection.prefill.id == selection.decode.id:
        ttft_s += predictors.model.request_s
    else:
        num_cached = selected_blocks(request, selection, snapshot.block_size) * snapshot.block_size
        num_bytes = handoff_bytes(predictors, request, selection.decode, snapshot.block_size, num_cached)
        ttft_s += predictors.handoff.predict(num_bytes, handoff_link(selection.prefill, selection.decode))
    step_s = selection.tpot_s if selection.tpot_s is not None else step_with(predictors, selection.decode, request.num_tokens)
    later_s = ttft_s * (predictors.promise.factor(parts.exposed_s) - 1.0)
    return Forecast(ttft_s, step_s, parts.exposed_s, later_s)


def prefill_forecast(
    predictors: Predictors, request: PlacementRequest, member: MemberState, prefix: PrefixHint | None, snapshot: Snapshot
) -> PrefillForecast:
    """request: weighed. prefix: what it could have from elsewhere, where that pays."""
    block_size = snapshot.block_size
    own, in_pages = cached_blocks(request, member, block_size), page_blocks(request, member, block_size)
    block_bytes, transfer = block_size * predictors.model.kv_bytes_per_token, predictors.transfer
    num_blocks, transfer_s = own, transfer.own((own - in_pages) * block_bytes)
    ssd_s = own_ssd_s(predictors, request, member.store_address, in_pages, block_size)
    if prefix is not None and fetch_pays(predictors, request, prefix.store_address, own, prefix.num_blocks, block_size):
        num_blocks = prefix.num_blocks
        transfer_s += transfer.predict((num_blocks - own) * block_bytes)
        ssd_s += fetched_ssd_s(predictors, request, prefix.store_address, own, num_blocks, block_size)
    num_cached = num_blocks * block_size
    due_s, passed_until_s = request.place.due_s, request.passed_until_s
    if member.gives_way:
        due_s = passed_until_s = math.inf
    prompt = Prompt(
        request.num_tokens - num_cached,
        num_cached,
        lets_pass_s=passed_until_s - snapshot.now_s,
        tpot_s=request.tpot_s(member.limits),
        due_in_s=due_s - snapshot.now_s,
    )
    wait = wait_for(predictors, prompt, member, len(snapshot.prefill), snapshot.now_s)
    return PrefillForecast(wait.queue_s, transfer_s, wait.prefill_s, ssd_s, wait.exposed_s)


def handoff_bytes(predictors: Predictors, request: PlacementRequest, decode: MemberState, block_size: int, num_cached_tokens: int) -> float:
    """Of what the decode worker's store lacks, those that the prefill behind num_cached_tokens does not hide."""
    store = decode.store_address
    num_held = (request.held_blocks.get(store, 0) - request.ssd_blocks.get(store, 0)) * block_size
    num_bytes = max(request.num_tokens - num_held, 0) * predictors.model.kv_bytes_per_token
    prefill_s = predictors.prefill.predict(request.num_tokens - num_cached_tokens, num_cached_tokens)
    return predictors.handoff.unhidden(num_bytes, prefill_s)


def handoff_link(prefill: MemberState, decode: MemberState) -> str:
    """Two workers without a store hand off through another node's."""
    return "node" if prefill.store_address == decode.store_address != "" else "net"
