"""Takes each time of a request once. Metrics and the PhaseRecord both read it from here. Only durations leave this file.

arrival ── queue ──► placed ── (prefill queue, load, prefill, push) ──► prefilled ── handoff_wait ──► admitted ──► tokens ─► end
           an attempt that failed before the first token counts as queue, so the phases up to that token add up to the TTFT
"""

from __future__ import annotations

import time

from ...protocol.v1 import common_pb2
from ..conductor.placement import Placement, Slo
from ..metrics import ProxyMetrics


class PhaseClock:
    def __init__(self, arrival: float, slo: Slo, metrics: ProxyMetrics) -> None:
        """arrival: of time.monotonic()."""
        self.record = common_pb2.PhaseRecord()
        self.num_cached_tokens: int | None = None  # of the first hand-off that decode admitted
        self._arrival = arrival
        self._slo = slo
        self._metrics = metrics
        self._prefilled = self._first = self._last = 0.0

    @property
    def has_first_token(self) -> bool:
        return self._first > 0

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
            record.prefill_s = phases.prefill_s
            record.prefill_compute_s = phases.compute_s
            record.push_s = phases.push_s
            record.transport = phases.transport
            record.handoff_wait_s = time.monotonic() - self._prefilled

    def tokens(self, num_tokens: int) -> None:
        """So many tokens leave the proxy now."""
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.record.ttft_s = now - self._arrival
            self._metrics.first_token(self.record)
            self._metrics.tokens_sent(1, None)
            if num_tokens > 1:
                self._metrics.tokens_sent(num_tokens - 1, 0.0)
        else:
            self._metrics.tokens_sent(num_tokens, now - self._last)
        self._last = now

    def finished(self, num_tokens: int, phases: common_pb2.DecodePhases) -> common_pb2.PhaseRecord:
        """num_tokens: all that were sent. Observes the whole record in the metrics."""
        record = self.record
        record.first_decode_s = phases.first_decode_s
        record.decode_s = phases.decode_s
        record.num_preemptions += phases.num_preemptions
        record.tpot_s = (self._last - self._first) / (num_tokens - 1) if num_tokens > 1 else 0.0
        record.e2e_s = self._last - self._arrival if num_tokens else self._elapsed()
        self._metrics.finished(record, num_tokens, self._slo)
        return record

    def _elapsed(self) -> float:
        return time.monotonic() - self._arrival


def handoff_s(record: common_pb2.PhaseRecord) -> float:
    """The part of the TTFT that no phase before the hand-off covers: the hand-off itself, and the calls around it."""
    return record.ttft_s - (record.queue_s + record.prefill_queue_s + record.prefix_load_s + record.prefill_s)
