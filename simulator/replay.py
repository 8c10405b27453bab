"""How a trace is replayed: as it is, or scaled by rules that keep what makes it a trace.

read_trace ─► sample sessions ─► spread arrivals inside a tick ─► cut a window, what came before warms the caches ─► ÷ speed
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..protocol.errors import ConfigError
from .trace import Trace, TraceRequest

TICK_S = 3.0  # the conversation trace's arrivals are rounded to it


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    speed: float = 1.0
    """Arrivals are this many times faster."""
    sample: float = 1.0
    """Share of the sessions kept. Whole sessions, because sampling requests would destroy the prefix hits."""
    dequantise: bool = False
    """Adds U(0, 3 s) to every arrival: the trace's clock ticks every 3 s."""
    start_s: float = 0.0
    """Start of the window in trace time; requests before it are not replayed."""
    duration_s: float = float("inf")
    warm_s: float = 1200.0
    """Blocks of the requests in this time before the window are in the caches when it opens."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.speed <= 0 or not 0 < self.sample <= 1:
            raise ConfigError(f"speed is {self.speed} and sample {self.sample}; speed must be above 0 and sample in (0, 1]")


class Replay(NamedTuple):
    requests: list[TraceRequest]  # by arrival, from 0 s
    warm: list[TraceRequest]  # by arrival; only their blocks matter


def replay(trace: Trace, options: ReplayOptions) -> Replay:
    rng = random.Random(options.seed)
    requests = list(trace.requests)
    if options.sample < 1.0:
        names = sessions(requests)
        kept = {name for name in sorted(set(names)) if rng.random() < options.sample}
        requests = [request for request, name in zip(requests, names, strict=True) if name in kept]
    if options.dequantise:
        requests = [request._replace(arrival_s=request.arrival_s + rng.uniform(0.0, TICK_S)) for request in requests]
        requests.sort(key=lambda request: request.arrival_s)
    start_s, end_s = options.start_s, options.start_s + options.duration_s
    warm = [request for request in requests if start_s - options.warm_s <= request.arrival_s < start_s]
    window = [request for request in requests if start_s <= request.arrival_s < end_s]
    return Replay([request._replace(arrival_s=(request.arrival_s - start_s) / options.speed) for request in window], warm)


def sessions(requests: Sequence[TraceRequest]) -> list[int]:
    """A session's name for every request: the first block that not half of all requests share (a system prompt is nobody's session)."""
    counts = Counter(block for request in requests for block in set(request.block_ids[:4]))
    common = {block for block, count in counts.items() if count > len(requests) / 2}
    return [next((block for block in request.block_ids if block not in common), request.block_ids[-1]) for request in requests]
