"""The last requests' decisions with their grounds: enough to explain each one, and cheap to keep.

open ─► RequestDecision ─► decided: AttemptDecision (the snapshot that the Conductor saw, the predictors as they were) ─► ended
                └─ the ring drops the oldest. Predictions for workers that were not chosen are made only on request.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ...protocol.errors import UnknownRequest
from ...protocol.v1 import common_pb2
from ..conductor.placement import NO_SLO, Placement, PlacementRequest, Rejection, Slo, Snapshot
from ..conductor.pool import Pool
from ..conductor.predictors.timing import Predictors
from ..request import MAX_CHOICES, ProxyRequest, RequestState
from ..verdict import Terms

NUM_KEPT = 16  # candidates for each role: the chosen one, and the least loaded others


@dataclass(slots=True)
class AttemptDecision:
    at_s: float  # since the arrival
    asked: PlacementRequest
    seen: Snapshot  # of the kept candidates only
    num_prefill: int
    num_decode: int
    predictors: Predictors  # frozen
    answer: Placement | Rejection
    error: str = ""  # what ended the attempt, if it failed


@dataclass(slots=True)
class RequestDecision:
    request_id: str
    num_tokens: int  # of the prompt
    terms: Terms
    priority: int
    arrival: float  # of time.monotonic()
    label: str = ""  # the client's own name for it
    first_token_due: float = math.inf  # what workers order its prompt by, of time.monotonic()
    attempts: list[AttemptDecision] = field(default_factory=list[AttemptDecision])
    state: str = RequestState.QUEUED.value
    ended: str = ""  # finish reason, or the error's code and words
    num_output_tokens: int = 0  # so far
    record: common_pb2.PhaseRecord = field(default_factory=common_pb2.PhaseRecord)  # the request's own, filled in as it goes on

    @property
    def slo(self) -> Slo:
        return self.terms.slo

    def decided(self, asked: PlacementRequest, seen: Snapshot, predictors: Predictors, answer: Placement | Rejection) -> AttemptDecision:
        chosen = (answer.prefill.id, answer.decode.id) if isinstance(answer, Placement) else ("", "")
        pools = _kept(seen.prefill, chosen[0]), _kept(seen.decode, chosen[1])
        kept = Snapshot(*pools, seen.block_size, seen.now_s, max_handoff_len=seen.max_handoff_len)
        at_s = time.monotonic() - self.arrival
        attempt = AttemptDecision(at_s, asked, kept, len(seen.prefill), len(seen.decode), predictors, answer)
        if isinstance(answer, Rejection) and self.attempts and isinstance(self.attempts[-1].answer, Rejection):
            self.attempts.pop()  # it waits, and is still refused
        self.attempts.append(attempt)
        return attempt

    def end(self, state: RequestState, reason: str) -> None:
        self.state, self.ended = state.value, reason


class DecisionLog:
    def __init__(self, size: int) -> None:
        self._size = size
        self._ring: deque[RequestDecision] = deque()
        self._by_id: dict[str, RequestDecision] = {}  # the newest of an id

    def __len__(self) -> int:
        return len(self._ring)

    def open(self, request: ProxyRequest, slo: Slo) -> RequestDecision:
        terms = _terms(request, slo)
        decision = RequestDecision(request.request_id, len(request.token_ids), terms, request.priority, request.arrival, request.label)
        self._ring.append(decision)
        self._by_id[request.request_id] = decision
        if len(self._ring) > self._size:
            oldest = self._ring.popleft()
            if self._by_id[oldest.request_id] is oldest:
                del self._by_id[oldest.request_id]
        return decision

    def ended(self) -> Iterator[RequestDecision]:
        """The remembered requests that are over, the latest arrival first."""
        return (decision for decision in reversed(self._ring) if decision.ended)

    def find(self, request_id: str) -> list[RequestDecision]:
        """The request, or all of its choices. request_id: or the label that clients gave to one or several. Raises UnknownRequest."""
        found = self._by_id.get(request_id)
        if found is not None:
            return [found]
        choices = [self._by_id.get(f"{request_id}-{index}") for index in range(MAX_CHOICES)]
        known = [choice for choice in choices if choice is not None]
        known = known or [decision for decision in self._ring if request_id and decision.label == request_id]
        if not known:
            raise UnknownRequest(
                f"no request {request_id!r} is among the last {len(self)}, which the proxy remembers (of at most {self._size}: "
                "proxy.num_explained); a request's id stands in its answer and in the x-request-id header",
                num_remembered=len(self),
            )
        return known


def _terms(request: ProxyRequest, slo: Slo) -> Terms:
    if slo == NO_SLO:
        return Terms()
    return Terms(slo, "default" if request.ttft_slo_s is None and request.tpot_slo_s is None else "own")


def _kept(pool: Pool, chosen: str) -> Pool:
    """The chosen worker and the least loaded of the others."""
    if len(pool) <= NUM_KEPT:
        return pool
    loads = pool.busy_until_s * 1e9 + pool.num_outstanding_tokens  # by time, and by tokens if the times are equal
    least = np.argpartition(loads, NUM_KEPT)[: NUM_KEPT + 1]
    rows = least[np.argsort(loads[least])].tolist()
    chosen_row = pool.row_of(chosen)
    if chosen_row is None:
        return pool.take(np.array(rows[: NUM_KEPT - 1]))
    others = [row for row in rows if row != chosen_row]
    return pool.take(np.array([chosen_row, *others[: NUM_KEPT - 1]]))
