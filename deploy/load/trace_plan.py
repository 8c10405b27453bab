"""A window of a trace in Mooncake's format as a load. A hash id is a segment of 512 tokens, so that prefixes repeat as in the trace.

Prompts above the cap are left out, because shortened ones would be a different load. Answers are cut. If the trace's clock ticks (the
conversation trace's every 3 s), its stamps are spread evenly inside the tick, or whole batches would come at one instant.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...protocol.errors import ConfigError
from ...simulator.trace import BLOCK_SIZE, Trace, TraceRequest, ideal_hits
from .plan import Plan, PlannedRequest, Segment

CROWDED = 1.5  # requests for each distinct stamp; with more the clock is taken to tick


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    start: int = 0
    """Index of the window's first request, among those that the cap leaves."""
    start_s: float = 0.0
    """In trace time. start counts from the first request at or after it."""
    count: int | None = None
    seconds: float | None = None
    """In trace time."""
    max_input: int = 131072
    max_output: int = 131072
    spread_s: float | None = None
    """Width over which equal stamps are spread. None: the clock's own tick, if it has one. 0: not spread."""
    num_warm_up: int = 0
    seed: int = 0


def trace_plan(trace: Trace, options: TraceOptions) -> Plan:
    """Raises ConfigError if the window is empty."""
    kept = [request for request in trace.requests if request.num_input_tokens <= options.max_input]
    tick_s = find_tick(kept) if options.spread_s is None else options.spread_s
    spread = _spread(kept, tick_s, options.seed)
    from_s = trace.requests[0].arrival_s + options.start_s
    first = next((number for number, request in enumerate(spread) if request.arrival_s >= from_s), len(spread)) + options.start
    window = spread[first : None if options.count is None else first + options.count]
    if options.seconds is not None and window:
        window = [request for request in window if request.arrival_s < window[0].arrival_s + options.seconds]
    if not window:
        raise ConfigError(
            f"the window of {trace.name} from request {first} on is empty; {len(kept)} of its {len(trace.requests)} requests have at most "
            f"{options.max_input} prompt tokens"
        )
    warm = spread[max(0, first - options.num_warm_up) : first] if options.num_warm_up else []
    # nothing comes before the beginning of the trace: use the window's own shapes with other tokens
    num_missing = options.num_warm_up - len(warm)
    planned_warm = [_planned(one, options.max_output, negate=True) for one in window[:num_missing]]
    planned_warm += [_planned(one, options.max_output) for one in warm]
    ceiling = ideal_hits(window)
    description = {
        "load": "trace", "trace": trace.name, "sha256": trace.sha256, **dataclasses.asdict(options), "tick_s": tick_s, "first": first,
        "num_too_long": len(trace.requests) - len(kept), "ceiling_tokens_ratio": ceiling.tokens_ratio,
    }  # fmt: skip
    requests = tuple(_planned(one, options.max_output) for one in window)
    return Plan("speed", requests, tuple(sorted(planned_warm, key=lambda one: one.arrival_s)), description)


def find_tick(requests: list[TraceRequest]) -> float:
    """Seconds between two stamps of a ticking clock; 0 if requests seldom share a stamp."""
    stamps = sorted({request.arrival_s for request in requests})
    if len(stamps) < 2 or len(requests) / len(stamps) < CROWDED:
        return 0.0
    return statistics.median(later - earlier for earlier, later in pairwise(stamps))


def _spread(requests: list[TraceRequest], tick_s: float, seed: int) -> list[TraceRequest]:
    offsets = np.random.default_rng((seed, 0x7)).uniform(0.0, tick_s, len(requests)) if tick_s else np.zeros(len(requests))
    moved = [request._replace(arrival_s=request.arrival_s + float(offset)) for request, offset in zip(requests, offsets, strict=True)]
    return sorted(moved, key=lambda request: request.arrival_s)


def _planned(request: TraceRequest, max_output: int, *, negate: bool = False) -> PlannedRequest:
    left = request.num_input_tokens
    segments: list[Segment] = []
    for block_id in request.block_ids:
        if left <= 0:
            break
        segments.append(Segment(-1 - block_id if negate else block_id, min(left, BLOCK_SIZE)))
        left -= BLOCK_SIZE
    return PlannedRequest(request.arrival_s, tuple(segments), min(request.num_output_tokens, max_output))
