"""What a selection of workers would mean for a request: predicted TTFT and time between tokens. What an admission judges."""

from __future__ import annotations

from typing import NamedTuple

from .member_state import MemberState
from .placement import PlacementRequest, PrefixHint, Selection, Snapshot
from .policies.base import cached_blocks, page_blocks
from .policies.prefix_cost import fetch_pays, fetched_ssd_s, own_ssd_s
from .predictors.timing import Predictors
from .predictors.waiting import queue_s, step_with


class Forecast(NamedTuple):
    ttft_s: float  # from now
    tpot_s: float  # of the decode worker's step as it runs now, with the request in its batch


class PrefillForecast(NamedTuple):
    """A first token's parts on one prefill worker, in seconds from now."""

    queue_s: float
    transfer_s: float  # of the prefix, from its own store and from elsewhere; what stands in its pages needs none
    prefill_s: float
    ssd_s: float  # stores' reads from SSD before the transfer


def forecast(predictors: Predictors, request: PlacementRequest, selection: Selection, snapshot: Snapshot) -> Forecast:
    """The policy's own predictions where it made some; and the hand-off, which no policy can avoid."""
    ttft_s = selection.ttft_s
    if ttft_s is None:
        ttft_s = sum(prefill_forecast(predictors, request, selection.prefill, selection.prefix, snapshot))
    if selection.prefill.id != selection.decode.id:
        num_bytes = handoff_bytes(predictors, request, selection.decode, snapshot.block_size)
        ttft_s += predictors.handoff.predict(num_bytes, handoff_link(selection.prefill, selection.decode))
    tpot_s = selection.tpot_s if selection.tpot_s is not None else step_with(predictors, selection.decode, request.num_tokens)
    return Forecast(ttft_s, tpot_s)


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
    prefill_s = predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
    return PrefillForecast(queue_s(predictors, member, snapshot.now_s), transfer_s, prefill_s, ssd_s)


def handoff_bytes(predictors: Predictors, request: PlacementRequest, decode: MemberState, block_size: int) -> int:
    """What the decode worker's store lacks of the request."""
    store = decode.store_address
    num_held = (request.held_blocks.get(store, 0) - request.ssd_blocks.get(store, 0)) * block_size
    return max(request.num_tokens - num_held, 0) * predictors.model.kv_bytes_per_token


def handoff_link(prefill: MemberState, decode: MemberState) -> str:
    """Two workers without a store hand off through another node's."""
    return "node" if prefill.store_address == decode.store_address != "" else "net"
