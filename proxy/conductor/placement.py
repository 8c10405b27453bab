"""The values that the Conductor reads and answers with. Plain and frozen, so that the simulator makes them as well.

PlacementRequest + Snapshot ──► Conductor.place ──► Placement | Rejection
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Slo(NamedTuple):
    """What a request is to be served within."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf  # between two tokens


NO_SLO = Slo()


@dataclass(frozen=True, slots=True)
class MemberState:
    """A worker that may be chosen: alive, and its node's store too."""

    id: str
    incarnation: str  # of the process; what PlacementRequest excludes by
    store_address: str  # the store on its node
    num_outstanding_tokens: int = 0  # prefill: still to compute; decode: of context held or promised
    kv_capacity_tokens: int = 0  # its pages; 0: unknown, taken as enough
    busy_until_s: float | None = None  # prefill: when all that was placed on it is computed, by prediction, on the snapshot's clock
    num_requests: int = 0  # decode: running, waiting or promised
    num_running: int = 0  # decode: of those, in its batch or waiting for room in it
    num_running_tokens: int = 0  # decode: their context
    role: str = ""  # "prefill" | "decode" | "coupled" where the pools hold members of several roles; "": the pool's own


class Arriving(NamedTuple):
    """A request that a prefill worker has yet to finish, as the decode pool will see it."""

    at_s: float  # predicted end of its prefill, on the snapshot's clock
    num_tokens: int  # of context


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment."""

    prefill: tuple[MemberState, ...]
    decode: tuple[MemberState, ...]
    block_size: int  # tokens
    now_s: float = 0.0  # of the clock that busy_until_s is on
    arriving: tuple[Arriving, ...] = ()  # placed, not yet decoding; and
    leaving: tuple[float, ...] = ()  # when each running decode began. Filled in where the admission asks for them


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    num_tokens: int  # to prefill: the prompt, and for a replay the tokens already sent
    held_blocks: Mapping[str, int] = field(default_factory=dict)  # store address -> leading blocks of the request that it holds
    exclude: frozenset[str] = frozenset()  # incarnations never to be chosen
    avoid: frozenset[str] = frozenset()  # incarnations to be chosen only where there is no other
    slo: Slo | None = None  # its own; None: the admission's
    priority: int = 0  # lower is sooner
    waited_s: float = 0.0  # since it arrived; counts against its SLO
    admitted: bool = False  # a replay: no admission is asked again


class PrefixHint(NamedTuple):
    """A store beside the prefill worker's own that holds more of the prefix."""

    store_address: str
    num_blocks: int


class Choice(NamedTuple):
    """What a policy answers."""

    prefill: MemberState
    decode: MemberState
    reason: str  # for people
    prefix: PrefixHint | None = None
    ttft_s: float | None = None  # predicted, where the policy predicts
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    prefill: MemberState
    decode: MemberState
    prefix: PrefixHint | None
    num_cached_tokens: int  # expected to be loaded and not computed
    reason: str
    ttft_s: float | None = None  # predicted, where the policy or the admission predicts
    tpot_s: float | None = None

    @property
    def is_local(self) -> bool:
        """One worker computes the prompt and decodes: there is no prefill leg and no hand-off."""
        return self.prefill.id == self.decode.id


def come_back(retry_after_s: float) -> str:
    """In words, and never "in 0.0 s"."""
    return f"come back in {max(retry_after_s, 0.1):.1f} s"


@dataclass(frozen=True, slots=True)
class Rejection:
    code: Literal["no_worker", "prompt_too_long", "overloaded"]  # of protocol/errors.py
    reason: str
    retry_after_s: float = 0.0  # overloaded: when the prediction says that it would fit
    ttft_s: float | None = None  # overloaded: predicted for the best choice, as in a Placement
    tpot_s: float | None = None
