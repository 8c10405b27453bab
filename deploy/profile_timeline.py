"""Derives from phase records and token times when each worker was busy, and so what a prefill and a step took.

prefill-0  ──████████────            a prefill alone on its worker            ► PrefillPoint
decode-0   ────────█·█·█·█·█─        a stretch of steps of the same batch     ► StepPoint
           ─1──1───2─2─1─1─1─        workers of the machine that compute      ► busy, of each point
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..client import PhaseRecord
from .profile_fit import Busy, PrefillPoint, RequestPoint, StepPoint

MIN_GAPS = 6  # between tokens; the mean of a shorter stretch is not used


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it. Times are seconds of the client's clock."""

    sent: float
    token_moments: tuple[float, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_bytes_loaded: int
    phases: PhaseRecord

    @property
    def prefill(self) -> Span:
        phases = self.phases
        start = self.sent + phases.queue_s + phases.prefill_queue_s + phases.prefix_load_s
        return Span(phases.prefill_worker, start, start + phases.prefill_s)

    @property
    def decode(self) -> Span:
        return Span(self.phases.decode_worker, self.token_moments[0], self.token_moments[-1])

    def num_tokens_at(self, moment: float) -> int:
        """Tokens of its context."""
        return self.num_prompt_tokens + sum(token <= moment for token in self.token_moments)


class Span(NamedTuple):
    worker: str
    start: float
    end: float

    def overlaps(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end


class Timeline:
    """For samples that were the cluster's only requests. node_of: worker id -> the machine whose cores it computes on."""

    def __init__(self, samples: Sequence[Sample], node_of: Mapping[str, str]) -> None:
        self._samples = samples
        self._node_of = node_of
        self._spans = [span for sample in samples for span in (sample.prefill, sample.decode) if span.end > span.start]

    def prefill_points(self, max_new: int) -> list[PrefillPoint]:
        """Points of prefills that had their worker to themselves and took one step, so at most max_new tokens."""
        prefills = [sample.prefill for sample in self._samples]
        found: list[PrefillPoint] = []
        for number, (sample, span) in enumerate(zip(self._samples, prefills, strict=True)):
            others = (other for at, other in enumerate(prefills) if at != number and other.worker == span.worker)
            num_new = sample.num_prompt_tokens - sample.num_cached_tokens
            if num_new <= max_new and span.end > span.start and not any(span.overlaps(other) for other in others):
                found.append(PrefillPoint(num_new, sample.num_cached_tokens, sample.phases.prefill_s, self.busy(span)))
        return found

    def step_points(self) -> list[StepPoint]:
        found: list[StepPoint] = []
        for worker in sorted({sample.phases.decode_worker for sample in self._samples}):
            mine = [sample for sample in self._samples if sample.phases.decode_worker == worker and len(sample.token_moments) > 1]
            node = self._node_of.get(worker)
            # cut wherever a worker of the machine begins or ends, so that the same workers compute throughout a stretch
            bounds = sorted({bound for span in self._spans if self._node_of.get(span.worker) == node for bound in span[1:]})
            for start, end in pairwise(bounds):
                stretch = Span(worker, start, end)
                point = self._step_point(stretch, [sample for sample in mine if sample.decode.overlaps(stretch)])
                if point is not None:
                    found.append(point)
        return found

    def request_points(self) -> list[RequestPoint]:
        """Points of requests that had the cluster to themselves."""
        found: list[RequestPoint] = []
        for sample in self._samples:
            phases = sample.phases
            there = Span("", sample.sent, sample.token_moments[0])
            if any(span not in (sample.prefill, sample.decode) and span.overlaps(there) for span in self._spans):
                continue
            handed_off_s, beside_s = phases.push_s + phases.handoff_wait_s, phases.ttft_s - phases.prefill_s
            found.append(RequestPoint(sample.num_bytes_loaded, phases.prefix_load_s, phases.num_bytes_pushed, handed_off_s, beside_s))
        return found

    def busy(self, span: Span) -> Busy:
        """How many workers of its machine computed during it, itself included, and for what share of it."""
        node = self._node_of.get(span.worker)
        near = [other for other in self._spans if other.overlaps(span) and self._node_of.get(other.worker) == node]
        inside = {bound for other in near for bound in other[1:] if span.start < bound < span.end}
        bounds = sorted({span.start, span.end, *inside})
        seconds: defaultdict[int, float] = defaultdict(float)
        for start, end in pairwise(bounds):
            piece = Span(span.worker, start, end)
            seconds[len({span.worker, *(other.worker for other in near if other.overlaps(piece))})] += end - start
        return tuple((num_busy, share / (span.end - span.start)) for num_busy, share in sorted(seconds.items()))

    def _step_point(self, stretch: Span, batch: Sequence[Sample]) -> StepPoint | None:
        steps: list[float] = []
        for sample in batch:
            inside = [moment for moment in sample.token_moments if stretch.start <= moment <= stretch.end]
            if len(set(inside)) <= MIN_GAPS:  # tokens of one message have the same time
                return None
            steps.append((inside[-1] - inside[0]) / (len(inside) - 1))
        if not steps:
            return None
        middle = (stretch.start + stretch.end) / 2
        num_kv_tokens = sum(sample.num_tokens_at(middle) for sample in batch)
        return StepPoint(len(batch), num_kv_tokens, sum(steps) / len(steps), self.busy(stretch))
