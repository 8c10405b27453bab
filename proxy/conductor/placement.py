"""The values that the Conductor reads and answers with. Plain and frozen, so that the simulator makes them as well.

PlacementRequest + Snapshot ──► Policy ──► Selection ──► Conductor.place ──► Placement | Rejection
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from ...protocol.timing.step_limits import StepLimits
from .backlog import ANYWHERE, QueuePlace, Waiting
from .member_state import MemberState
from .pool import Floats, Ints, Pool


class Slo(NamedTuple):
    """What a request is to be served within."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf  # between two tokens


NO_SLO = Slo()


class Arriving(NamedTuple):
    """A request that a prefill worker has yet to finish, as the decode pool will see it."""

    at_s: float  # predicted end of its prefill, on the snapshot's clock
    num_tokens: int  # of context


class Arrivals(NamedTuple):
    """Arriving requests, a row each."""

    at_s: Floats
    num_tokens: Ints

    @classmethod
    def of(cls, requests: Iterable[Arriving]) -> Arrivals:
        found = list(requests)
        return cls(np.array([one.at_s for one in found], np.float64), np.array([one.num_tokens for one in found], np.int64))


NOBODY = Arrivals.of(())
NEVER: Floats = np.zeros(0, np.float64)
NO_BOUND = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment. Valid until the next one is made: the live cluster's columns change in place."""

    prefill: Pool
    decode: Pool
    block_size: int  # tokens
    now_s: float = 0.0  # of the clock that busy_until_s is on
    arriving: Arrivals = NOBODY  # placed and not decoding yet
    began_s: Floats = field(
        default_factory=lambda: NEVER
    )  # when each running decode began; like arriving, filled in where the admission wants it
    max_handoff_len: int = NO_BOUND  # tokens of the largest hand-off that a live store takes; 0: there is no live store
    waiting: Callable[[str], list[Waiting]] | None = None  # a worker's id -> its prefills, where their order is to be looked at

    @classmethod
    def of(
        cls,
        prefill: Iterable[MemberState],
        decode: Iterable[MemberState],
        block_size: int,
        now_s: float = 0.0,
        arriving: Iterable[Arriving] = (),
        began_s: Iterable[float] = (),
    ) -> Snapshot:
        return cls(Pool.of(prefill), Pool.of(decode), block_size, now_s, Arrivals.of(arriving), np.array(list(began_s), np.float64))


class SsdVerdict(NamedTuple):
    """On blocks that a store has on SSD alone."""

    num_blocks: int
    load_s: float  # predicted: into its DRAM, and on to a worker of its node
    compute_s: float

    @property
    def loads(self) -> bool:
        return self.load_s <= self.compute_s

    def __str__(self) -> str:
        done = "are loaded" if self.loads else "are computed"
        return f"{self.num_blocks} blocks on SSD {done}: loading takes {self.load_s:.3g} s, computing {self.compute_s:.3g} s"


NO_VERDICTS: Mapping[str, SsdVerdict] = MappingProxyType({})
NO_BLOCKS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    num_tokens: int  # to prefill: the prompt, and for a replay the tokens already sent
    held_blocks: Mapping[str, int] = field(default_factory=dict[str, int])  # store address -> leading blocks of the request that it holds
    exclude: frozenset[str] = frozenset()  # incarnations never to be chosen
    avoid: frozenset[str] = frozenset()  # incarnations to be chosen only where there is no other
    slo: Slo | None = None  # its own; None: the admission's
    priority: int = 0  # lower is sooner
    waited_s: float = 0.0  # since it arrived; counts against its SLO
    admitted: bool = False  # a replay: no admission is asked again
    page_blocks: Mapping[str, int] = field(default_factory=dict[str, int])  # worker id -> leading blocks of it in its pages
    ssd_blocks: Mapping[str, int] = field(default_factory=lambda: NO_BLOCKS)  # store address -> of held_blocks, the last ones: on SSD alone
    ssd_verdicts: Mapping[str, SsdVerdict] = field(default_factory=lambda: NO_VERDICTS)  # by store address, once weighed
    place: QueuePlace = ANYWHERE  # in workers' queues; due_s is of the snapshot's clock
    passed_until_s: float = -math.inf  # what its place stands for, by the same clock: later arrivals with an earlier moment pass it

    def tpot_s(self, limits: StepLimits) -> float:
        """That a worker with these limits sizes its steps for; inf: none."""
        own_s = self.slo.tpot_s if self.slo is not None else math.inf
        return own_s if math.isfinite(own_s) else limits.tpot_target_s or math.inf


class PrefixHint(NamedTuple):
    """A store beside the prefill worker's own that holds more of the prefix."""

    store_address: str
    num_blocks: int


class Selection(NamedTuple):
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
    ssd_verdicts: Mapping[str, SsdVerdict] = field(default_factory=lambda: NO_VERDICTS)  # of the stores that the prefill worker asks
    exposed_s: float = 0.0  # of the TTFT, that others may pass it in
    promised_ttft_s: float | None = None  # nine of ten come within it

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
    ttft_s: float | None = None  # overloaded: predicted for the best selection, as in a Placement
    tpot_s: float | None = None
