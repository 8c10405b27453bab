"""Takes each time of a request once. Metrics and the PhaseRecord both read it from here. Only durations leave this file.

arrival ── queue ──► placed ── (prefill queue, load, prefill, push) ──► prefilled ── handoff_wait ──► admitted, first token came
        ── write ──► written to the client ─► … ─► the last one written: the end
           an attempt that failed before the first token counts as queue: the phases up to that token add up to the TTFT
"""

from __future__ import annotations

import time

from ...protocol.errors import HalfmoonError
from ...protocol.trace_context import TraceContext
from ...protocol.v1 import common_pb2
from ..conductor.placement import Placement
from ..metrics import ProxyMetrics
from ..verdict import Terms, Verdict, judge_done, judge_error, judge_left


class PhaseClock:
    def __init__(self, arrival: float, terms: Terms, metrics: ProxyMetrics, trace: TraceContext | None = None) -> None:
        """arrival: of time.monotonic(). trace: the exemplar of its time to the first token."""
        self.record = common_pb2.PhaseRecord()
        self.num_cached_tokens: int | None = None  # of the first hand-off that decode admitted
        self._arrival = arrival
        self._terms = terms
        self._metrics = metrics
        self._trace = trace
        self._prefilled = self._came = self._first = self._last = 0.0

    @property
    def has_first_token(self) -> bool:
        return self._came > 0

    def placed(self, placement: Placement) -> None:
        record = self.record
        record.num_attempts += 1
        record.decode_worker = placement.decode.id
        if not self.has_first_token:
            record.queue_s = self._elapsed()
            record.prefill_worker = placement.prefill.id
            record.placement_reason = placement.reason
            record.predicted_ttft_s = record.queue_s + placement.ttft_s if placement.ttft_s is not None else 0.0
            record.predicted_tpot_s = placement.tpot_s or 0.0

    def prefilled(self) -> None:
        """Prefill reported done, or decode proved it by admitting the hand-off. The first call counts."""
        if self.record.prefill_done_s == 0:
            self.record.prefill_done_s = self._elapsed()
            self._metrics.prefill_done(self.record.prefill_done_s)
        self._prefilled = time.monotonic()

    def admitted(self, state: common_pb2.HandoffState) -> None:
        record, phases = self.record, state.phases
        record.num_bytes_pushed += phases.num_bytes_pushed
        if self.num_cached_tokens is None:
            self.num_cached_tokens = state.num_cached_tokens
        if not self.has_first_token:
            record.prefill_queue_s = phases.queue_s
            record.prefix_load_s = phases.prefix_load_s
            record.ssd_wait_s = phases.ssd_wait_s
            record.prefill_s = phases.prefill_s
            record.prefill_compute_s = phases.compute_s
            record.push_s = phases.push_s
            record.transport = phases.transport
            record.handoff_wait_s = time.monotonic() - self._prefilled

    def first_came(self) -> None:
        """The first token is at the proxy. What its time to the first token is, its write will say."""
        self._came = time.monotonic()
        self.record.ttft_s = self._came - self._arrival

    def wrote(self, num_tokens: int) -> None:
        """They have been written to the client's connection now."""
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.record.ttft_s = now - self._arrival
            self.record.write_s = now - self._came
            self._metrics.first_token(self.record, self._trace)
            self._metrics.tokens_written(1, None)
            if num_tokens > 1:
                self._metrics.tokens_written(num_tokens - 1, 0.0)
        else:
            self._metrics.tokens_written(num_tokens, now - self._last)
        self._last = now

    def decoded(self, phases: common_pb2.DecodePhases) -> None:
        """The last token is at the proxy, or there will be none."""
        record = self.record
        record.first_decode_s = phases.first_decode_s
        record.decode_s = phases.decode_s
        record.num_preemptions += phases.num_preemptions

    def finished(self, usage: common_pb2.Usage) -> Verdict:
        """The last token has been written. Observes the whole record."""
        record, num_tokens = self.record, usage.num_completion_tokens
        if num_tokens and not self._first:
            return self.left()  # with nothing of its answer
        record.tpot_s = (self._last - self._first) / (num_tokens - 1) if num_tokens > 1 else 0.0
        record.e2e_s = self._last - self._arrival if num_tokens else self._elapsed()
        self._metrics.finished(record, usage)
        return judge_done(self._terms, record, num_tokens)

    def failed(self, error: HalfmoonError, *, rejected: bool) -> Verdict:
        return judge_error(self._terms, error, rejected=rejected)

    def left(self) -> Verdict:
        """The client has."""
        return judge_left(self._terms, None if self._first else self._elapsed())

    def _elapsed(self) -> float:
        return time.monotonic() - self._arrival


def handoff_s(record: common_pb2.PhaseRecord) -> float:
    """What of the time to the first token no other phase names: the hand-off itself, and the calls around it."""
    return record.ttft_s - record.write_s - (record.queue_s + record.prefill_queue_s + record.prefix_load_s + record.prefill_s)
