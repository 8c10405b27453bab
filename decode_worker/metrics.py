"""What a decode worker exports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from ..protocol import metrics
from ..protocol.exporter import counter, gauge, histogram
from .scheduler import DecodeScheduler

ROLE = "decode"


class DecodeMetrics:
    def __init__(self, scheduler: DecodeScheduler) -> None:
        """Gauges are read from the scheduler when Prometheus asks; each is the length of collections, so without its lock."""
        self.registry = CollectorRegistry()
        gauge(metrics.NUM_REQUESTS_RUNNING, self.registry).labels(ROLE).set_function(lambda: scheduler.num_running)
        gauge(metrics.NUM_REQUESTS_WAITING, self.registry).labels(ROLE).set_function(lambda: scheduler.num_waiting)
        gauge(metrics.KV_CACHE_USAGE, self.registry).labels(ROLE).set_function(lambda: scheduler.allocator.usage_ratio)
        self._step_seconds = histogram(metrics.STEP_SECONDS, self.registry).labels(ROLE)
        self._step_tokens = counter(metrics.STEP_TOKENS, self.registry).labels(ROLE)
        self._preemptions = counter(metrics.PREEMPTIONS, self.registry)
        self._transfer_bytes = counter(metrics.KV_TRANSFER_BYTES, self.registry)
        self._transfer_seconds = histogram(metrics.KV_TRANSFER_SECONDS, self.registry)
        self._prefix_queries = counter(metrics.PREFIX_CACHE_QUERIES, self.registry)
        self._prefix_hits = counter(metrics.PREFIX_CACHE_HITS, self.registry)
        self._prefix_failures = counter(metrics.PREFIX_LOAD_FAILURES, self.registry)
        self._refused = counter(metrics.HANDOFFS_REFUSED, self.registry)

    def stepped(self, seconds: float, num_tokens: int, num_preempted: int) -> None:
        self._step_seconds.observe(seconds)
        self._step_tokens.inc(num_tokens)
        self._preemptions.inc(num_preempted)

    def transferred(self, transport: str, direction: str, num_bytes: int, seconds: float) -> None:
        """direction: fetch | load | keep."""
        self._transfer_bytes.labels(transport, direction).inc(num_bytes)
        self._transfer_seconds.labels(transport, direction).observe(seconds)

    def prefix(self, num_queried: int, num_hit: int) -> None:
        """Tokens, in the node's own store."""
        self._prefix_queries.labels("local").inc(num_queried)
        self._prefix_hits.labels("local").inc(num_hit)

    def prefix_failed(self, code: str) -> None:
        self._prefix_failures.labels(code).inc()

    def handoff_refused(self, code: str) -> None:
        self._refused.labels(code).inc()
