"""What a choice of workers would mean for a request: predicted TTFT and time between tokens. What an admission judges."""

from __future__ import annotations

from typing import NamedTuple

from .placement import Choice, PlacementRequest, Snapshot
from .policies.base import cached_blocks
from .predictors.timing import Predictors
from .predictors.waiting import queue_s, step_with


class Forecast(NamedTuple):
    ttft_s: float  # from now
    tbt_s: float  # of the decode worker's step, with the request in its batch, as it runs now


def forecast(predictors: Predictors, request: PlacementRequest, choice: Choice, snapshot: Snapshot) -> Forecast:
    """The policy's own predictions where it made some."""
    ttft_s = choice.ttft_s
    if ttft_s is None:
        own = cached_blocks(request, choice.prefill, snapshot.block_size)
        num_blocks = own if choice.prefix is None else max(own, choice.prefix.num_blocks)
        num_cached = num_blocks * snapshot.block_size
        transfer_s = predictors.transfer.predict((num_blocks - own) * snapshot.block_size * predictors.model.kv_bytes_per_token)
        queued_s = queue_s(predictors, choice.prefill, snapshot.now_s)
        ttft_s = queued_s + transfer_s + predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
    tbt_s = choice.tbt_s if choice.tbt_s is not None else step_with(predictors, choice.decode, request.num_tokens)
    return Forecast(ttft_s, tbt_s)
