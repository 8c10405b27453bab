"""One worker as the Conductor sees it."""

from __future__ import annotations

from dataclasses import dataclass

from ...protocol.timing.step_limits import DEFAULT_LIMITS, StepLimits

DECODES_ITS_OWN = frozenset({"coupled", "decode"})  # roles of workers that decode what they prefill


@dataclass(frozen=True, slots=True)
class MemberState:
    """A worker that may be chosen."""

    id: str
    incarnation: str  # of the process; what PlacementRequest excludes by
    store_address: str  # the live store on its node; "": there is none
    num_outstanding_tokens: int = 0  # prefill: still to compute; decode: of context held or promised
    kv_capacity_tokens: int = 0  # its pages; 0: unknown, taken as enough
    busy_until_s: float | None = None  # prefill: when all that is before the request is computed, by prediction, on the snapshot's clock
    num_requests: int = 0  # decode: running, waiting or promised
    num_running: int = 0  # decode: of those, in its batch or waiting for room in it
    num_running_tokens: int = 0  # decode: their context
    role: str = ""  # "prefill" | "decode" | "coupled" where the pools hold members of several roles; "": the pool's own
    num_ahead_tokens: float = 0.0  # to prefill before the request, by its place in the queue
    num_behind_tokens: float = 0.0  # and after it
    behind_s: float = 0.0  # that those take, by prediction
    limits: StepLimits = DEFAULT_LIMITS
    gives_way: bool = False  # the request would be late there, and lets all pass that can be in time
