"""Why a request went where it went: what each worker was predicted to mean for it, what was chosen, what came of it.

Explanation ── DecisionAttempt (reason or rejection) ── Candidate (per worker that could have been chosen)
                     └── Prediction (per predicted number, and what it was)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..protocol.v1 import control_pb2
from .completion import PhaseRecord


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the Conductor saw it, with predicted seconds. For a prefill worker queue_s to ttft_s, for a decode worker step_s."""

    id: str
    chosen: bool
    num_cached_blocks: int
    queue_s: float
    ssd_s: float
    transfer_s: float
    prefill_s: float
    ttft_s: float
    step_s: float
    num_running: int
    num_outstanding_tokens: int


@dataclass(frozen=True, slots=True)
class Prediction:
    name: str
    predicted_s: float
    measured_s: float | None
    """None: not measured, or not yet."""

    @property
    def relative_error(self) -> float | None:
        """(predicted - measured) / measured."""
        return (self.predicted_s - self.measured_s) / self.measured_s if self.measured_s else None


@dataclass(frozen=True, slots=True)
class DecisionAttempt:
    at_s: float
    """From the arrival."""
    prefill: tuple[Candidate, ...]
    decode: tuple[Candidate, ...]
    num_prefill: int
    """Candidates there were; of many, the chosen and the least loaded are listed."""
    num_decode: int
    reason: str
    """Why the request was placed so, or why it was rejected."""
    rejection_code: str
    """Empty where it was placed."""
    retry_after_s: float
    num_cached_tokens: int
    prefix_store: str
    """The store that held more of the prefix than the prefill worker's own; empty: none did, or it was not used."""
    prefix_blocks: int
    error: str
    """The error that ended the attempt; empty if it did not fail."""
    queue_order: int
    """Its order in the workers' queues; lower is sooner."""
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    request_id: str
    state: str
    ended: str
    """Finish reason, or the error; empty while it runs."""
    num_tokens: int
    ttft_slo_s: float
    """0: none."""
    tpot_slo_s: float
    priority: int
    age_s: float
    policy: str
    admission: str
    attempts: tuple[DecisionAttempt, ...]
    phases: PhaseRecord

    @classmethod
    def from_proto(cls, message: control_pb2.Explanation) -> Explanation:
        plain = {name: getattr(message, name) for name in cls.__slots__ if name not in ("attempts", "phases")}
        return cls(**plain, attempts=tuple(map(_attempt, message.attempts)), phases=PhaseRecord.from_proto(message.phases))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _attempt(message: control_pb2.Explanation.Attempt) -> DecisionAttempt:
    plain = {name: getattr(message, name) for name in DecisionAttempt.__slots__ if name not in ("prefill", "decode", "predictions")}
    predictions = tuple(Prediction(one.name, one.predicted_s, one.measured_s if one.measured else None) for one in message.predictions)
    return DecisionAttempt(
        **plain, prefill=tuple(map(_candidate, message.prefill)), decode=tuple(map(_candidate, message.decode)), predictions=predictions
    )


def _candidate(message: control_pb2.Explanation.Candidate) -> Candidate:
    return Candidate(**{name: getattr(message, name) for name in Candidate.__slots__})
