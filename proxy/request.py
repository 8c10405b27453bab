"""A request as the proxy owns it: the checked request, its state, and the events that a face turns into text.

QUEUED ─► PREFILL ─► HANDOFF ─► DECODE ─► DONE          (no HANDOFF if the decode worker prefills)
   │         └─────────┴──────────┴──► QUEUED    a worker died: replayed with the tokens sent so far
   └─► REJECTED        any ─► ABORTED (client gone, cancelled) | FAILED (error, deadline)
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..protocol.sampling import SamplingParams
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import common_pb2

MAX_N = 128  # choices of a prompt
MAX_CHOICES = 2048  # of one client request, over all its prompts


class RequestState(enum.StrEnum):
    QUEUED = "queued"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    DONE = "done"
    REJECTED = "rejected"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    """One choice of a request, checked: the token ids fit the model, the sampling parameters are in range, the seed is set."""

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    timeout_s: float
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)  # when the face received it
    ttft_slo_s: float | None = None  # None: the proxy's own SLO
    tpot_slo_s: float | None = None
    trace: TraceContext | None = None
    operation: str = "text_completion"  # or chat, as OpenTelemetry names them
    label: str = ""  # the client's own name for it
    salt: bytes = field(default=b"", repr=False)  # of its tenant's block keys


class Tokens(NamedTuple):
    token_ids: list[int]
    outputs: list[common_pb2.TokenOutput]  # one for each token if logprobs were asked for, else none


class Finished(NamedTuple):
    reason: common_pb2.FinishReason
    phases: common_pb2.PhaseRecord
    usage: common_pb2.Usage


TokenEvent = Tokens | Finished
