"""What a selection of workers would mean for a request: predicted TTFT and time between tokens. What an admission judges."""

from __future__ import annotations

from typing import NamedTuple

from .member_state import MemberState
from .placement import PlacementRequest, Selection, Snapshot
from .policies.base import cached_blocks, page_blocks
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


def forecast(predictors: Predictors, request: PlacementRequest, selection: Selection, snapshot: Snapshot) -> Forecast:
    """The policy's own predictions where it made some; and the hand-off, which no policy can avoid."""
    ttft_s = selection.ttft_s
    if ttft_s is None:
        num_blocks = selection.prefix.num_blocks if selection.prefix is not None else 0
        ttft_s = sum(prefill_forecast(predictors, request, selection.prefill, num_blocks, snapshot))
    if selection.prefill.id != selection.decode.id:
        num_bytes = handoff_bytes(predictors, request, selection.decode, snapshot.block_size)
        ttft_s += predictors.handoff.predict(num_bytes, handoff_link(selection.prefill, selection.decode))
    tpot_s = selection.tpot_s if selection.tpot_s is not None else step_with(predictors, selection.decode, request.num_tokens)
    return Forecast(ttft_s, tpot_s)


def prefill_forecast(
    predictors: Predictors, request: PlacementRequest, member: MemberState, num_prefix_blocks: int, snapshot: Snapshot
) -> PrefillForecast:
    """num_prefix_blocks: leading blocks that it could have from elsewhere."""
    block_size = snapshot.block_size
    own = cached_blocks(request, member, block_size)
    num_blocks = max(own, num_prefix_blocks)
    num_cached = num_blocks * block_size
    block_bytes, transfer = block_size * predictors.model.kv_bytes_per_token, predictors.transfer
    return PrefillForecast(
        queue_s(predictors, member, snapshot.now_s),
        transfer.own((own - page_blocks(request, member, block_size)) * block_bytes) + transfer.predict((num_blocks - own) * block_bytes),
        predictors.prefill.predict(request.num_tokens - num_cached, num_cached),
    )


def handoff_bytes(predictors: Predictors, request: PlacementRequest, decode: MemberState, block_size: int) -> int:
    """What the decode worker's store lacks of the request."""
    num_held = request.held_blocks.get(decode.store_address, 0) * block_size
    return max(request.num_tokens - num_held, 0) * predictors.model.kv_bytes_per_token


def handoff_link(prefill: MemberState, decode: MemberState) -> str:
    """Two workers without a store hand off through another node's."""
    return "node" if prefill.store_address == decode.store_address != "" else "net"
