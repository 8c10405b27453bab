"""The shape of a load before any token is drawn: when requests come, what they share, how long their answers are.

A prompt is a run of segments. A segment's tokens are drawn from its key and the run's salt. Equal keys at the start of two prompts are
therefore a shared prefix, and another salt gives the same load with entirely new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 64  # tokens for each of the balancer's block keys
VOCAB_LOW = 100  # lower ids are often special tokens

TokenIds = NDArray[np.uint32]


class Segment(NamedTuple):
    key: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    arrival_s: float  # at factor 1: a trace's own time, or synthetic load at one request a second
    segments: tuple[Segment, ...]
    num_output_tokens: int
    cancel_after: int | None = None
    """The client leaves after so many tokens."""
    measured: bool = True

    @property
    def num_input_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Plan:
    kind: str  # meaning of the factor: "rate" (requests/s) or "speed" (relative to the trace's own time)
    requests: tuple[PlannedRequest, ...]  # by arrival
    warm_up: tuple[PlannedRequest, ...]
    description: dict[str, Any]

    @property
    def span_s(self) -> float:
        """From the first arrival to the last, at factor 1."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class LoadRequest:
    index: int
    due_s: float  # after the window's start
    token_ids: TokenIds  # [num_input_tokens]
    num_output_tokens: int
    block_keys: tuple[int, ...]  # one for each full block, over it and all before it; comparable within one process only
    cancel_after: int | None
    measured: bool


def with_cancellations(plan: Plan, share: float, seed: int) -> Plan:
    """The clients of a share of the requests, chosen by the seed, leave after half of their answer."""
    rng = np.random.default_rng((seed, 0xCA))
    chosen = rng.random(len(plan.requests)) < share
    requests = tuple(
        replace(request, cancel_after=max(1, request.num_output_tokens // 2)) if leaves else request
        for request, leaves in zip(plan.requests, chosen, strict=True)
    )
    return replace(plan, requests=requests)


def measured_within(plan: Plan, factor: float, from_s: float, to_s: float) -> Plan:
    """Only requests that arrive inside [from_s, to_s) of the window count. The others are sent as well."""
    first = plan.requests[0].arrival_s if plan.requests else 0.0
    requests = tuple(
        replace(request, measured=from_s <= (request.arrival_s - first) / factor < to_s) for request in plan.requests
    )  # fmt: skip
    return replace(plan, requests=requests)


def materialise(planned: Sequence[PlannedRequest], factor: float, salt: int, vocab_size: int) -> list[LoadRequest]:
    """Draws the tokens and the times. The first request is due at 0.

    Args:
        factor: requests a second, or how many times faster than the trace.
        salt: runs with the same salt have the same tokens; runs with different salts share tokens only by chance.
        vocab_size: ids are drawn from [100, vocab_size).
    """
    drawn: dict[Segment, TokenIds] = {}
    first = planned[0].arrival_s if planned else 0.0
    made: list[LoadRequest] = []
    for index, request in enumerate(planned):
        parts = [drawn[part] if part in drawn else drawn.setdefault(part, _draw(part, salt, vocab_size)) for part in request.segments]
        token_ids = np.concatenate(parts)
        due_s, keys = (request.arrival_s - first) / factor, block_keys(token_ids)
        made.append(LoadRequest(index, due_s, token_ids, request.num_output_tokens, keys, request.cancel_after, request.measured))
    return made


def _draw(segment: Segment, salt: int, vocab_size: int) -> TokenIds:
    # numpy takes no negative seeds; this keeps keys of both signs apart
    seed = (salt, abs(segment.key), int(segment.key < 0))
    return np.random.default_rng(seed).integers(VOCAB_LOW, vocab_size, size=segment.num_tokens, dtype=np.uint32)


def block_keys(token_ids: TokenIds) -> tuple[int, ...]:
    num_blocks = len(token_ids) // BLOCK_SIZE
    keys: list[int] = []
    key = 0
    for number in range(num_blocks):
        key = hash((key, token_ids[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE].tobytes()))
        keys.append(key)
    return tuple(keys)
