"""The decode half's own metrics, beside those of the worker."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from ..protocol import metrics
from ..protocol.exporter import counter


class DecodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._preemptions = counter(metrics.PREEMPTIONS, registry)
        self._refused = counter(metrics.HANDOFFS_REFUSED, registry)

    def preempted(self, num_preempted: int) -> None:
        self._preemptions.inc(num_preempted)

    def handoff_refused(self, code: str) -> None:
        self._refused.labels(code).inc()
