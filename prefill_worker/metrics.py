"""What a prefill worker exports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from ..protocol import metrics
from ..protocol.exporter import counter, gauge, histogram
from .scheduler import PrefillScheduler

ROLE = "prefill"


class PrefillMetrics:
    def __init__(self, scheduler: PrefillScheduler) -> None:
        """Gauges are read from the scheduler when Prometheus asks; each is the length of one collection, so without its lock."""
        self.registry = CollectorRegistry()
        gauge(metrics.NUM_REQUESTS_RUNNING, self.registry).labels(ROLE).set_function(lambda: scheduler.num_running)
        gauge(metrics.NUM_REQUESTS_WAITING, self.registry).labels(ROLE).set_function(lambda: scheduler.num_waiting)
        gauge(metrics.KV_CACHE_USAGE, self.registry).labels(ROLE).set_function(lambda: scheduler.allocator.usage_ratio)
        self.step_seconds = histogram(metrics.STEP_SECONDS, self.registry).labels(ROLE)
        self.step_tokens = counter(metrics.STEP_TOKENS, self.registry).labels(ROLE)
        self._transfer_bytes = counter(metrics.KV_TRANSFER_BYTES, self.registry)
        self._transfer_seconds = histogram(metrics.KV_TRANSFER_SECONDS, self.registry)
        self._prefix_queries = counter(metrics.PREFIX_CACHE_QUERIES, self.registry)
        self._prefix_hits = counter(metrics.PREFIX_CACHE_HITS, self.registry)
        self._prefix_failures = counter(metrics.PREFIX_LOAD_FAILURES, self.registry)

    def stepped(self, seconds: float, num_tokens: int) -> None:
        self.step_seconds.observe(seconds)
        self.step_tokens.inc(num_tokens)

    def transferred(self, transport: str, direction: str, num_bytes: int, seconds: float) -> None:
        """direction: load | push | keep."""
        self._transfer_bytes.labels(transport, direction).inc(num_bytes)
        self._transfer_seconds.labels(transport, direction).observe(seconds)

    def prefix(self, tier: str, num_queried: int, num_hit: int) -> None:
        """Tokens. tier: local | remote, where they were found or last looked for."""
        self._prefix_queries.labels(tier).inc(num_queried)
        self._prefix_hits.labels(tier).inc(num_hit)

    def prefix_failed(self, code: str) -> None:
        self._prefix_failures.labels(code).inc()
