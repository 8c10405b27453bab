"""Loads that are made and not recorded: arrivals, prompt lengths and answer lengths drawn from a few numbers each.

Load ──make(num requests, rate, seed)──► Trace          every prompt is its own: nothing is shared
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from ..protocol.errors import ConfigError
from .trace import BLOCK_SIZE, Trace, TraceRequest

LONGEST = 131_072  # tokens


@dataclass(frozen=True, slots=True)
class Load:
    """
    Args:
        num_input_tokens: mean of the prompts.
        num_output_tokens: mean of the answers.
        spread: deviation of the lengths by their mean; log-normal. 0: all alike.
        burst: deviation of the gaps between arrivals by their mean; 1: Poisson, above: bursts (gamma).
    """

    name: str
    num_input_tokens: float
    num_output_tokens: float
    spread: float = 0.5
    burst: float = 1.0

    def __post_init__(self) -> None:
        if self.num_input_tokens < 1 or self.num_output_tokens < 1 or self.spread < 0 or self.burst <= 0:
            raise ConfigError(f"{self} is no load: lengths must be at least 1, spread at least 0, burst above 0")

    def make(self, num_requests: int, rate: float = 1.0, seed: int = 0, *, start_s: float = 0.0) -> Trace:
        """rate: requests a second, on average."""
        if num_requests < 1 or rate <= 0:
            raise ConfigError(f"{num_requests} requests at {rate} a second; give at least one, at a rate above 0")
        draw = random.Random(f"{self.name} {seed}")
        shape = 1.0 / self.burst**2
        now, fresh, made = start_s, 1, list[TraceRequest]()
        for _ in range(num_requests):
            now += draw.gammavariate(shape, 1.0 / (rate * shape))
            num_input, num_output = self._length(draw, self.num_input_tokens), self._length(draw, self.num_output_tokens)
            num_blocks = -(-num_input // BLOCK_SIZE)
            made.append(TraceRequest(now, num_input, num_output, tuple(range(fresh, fresh + num_blocks))))
            fresh += num_blocks
        return trace_of(self.name, made)

    def _length(self, draw: random.Random, mean: float) -> int:
        if not self.spread:
            return max(round(mean), 1)
        variance = math.log1p(self.spread**2)
        return min(max(round(mean * math.exp(draw.gauss(-variance / 2, math.sqrt(variance)))), 1), LONGEST)


def shift(first: Trace, second: Trace) -> Trace:
    """One load, and when it is over the other. Their prompts share nothing."""
    offset_s = first.requests[-1].arrival_s - second.requests[0].arrival_s
    fresh = 1 + max(max(request.block_ids, default=0) for request in first.requests)
    later = [
        request._replace(arrival_s=request.arrival_s + offset_s, block_ids=tuple(block + fresh for block in request.block_ids))
        for request in second.requests
    ]
    return trace_of(f"{first.name}, then {second.name}", [*first.requests, *later])


def trace_of(name: str, requests: list[TraceRequest]) -> Trace:
    return Trace(name, hashlib.sha256(repr(requests).encode()).hexdigest(), tuple(requests))
