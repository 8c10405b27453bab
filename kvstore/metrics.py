"""The store's Prometheus metrics: gauges that read the lease manager when scraped, counters fed by its events."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from ..protocol import exporter
from ..protocol.metrics import (
    STORE_ABORTED_HANDOFFS,
    STORE_ARENA_BYTES,
    STORE_EVICTED_BLOCKS,
    STORE_EXPIRED_LEASES,
    STORE_HANDOFFS,
    STORE_LEASES,
    STORE_REPLICATED_BLOCKS,
    STORE_REPLICATED_BYTES,
    STORE_REPLICATION_SECONDS,
    STORE_SESSIONS,
    STORE_SSD_BLOCKS,
    STORE_SSD_BYTES,
)
from ..protocol.v1 import kvstore_pb2


class StoreMetrics:
    def __init__(self, stats: Callable[[], kvstore_pb2.StatsReply]) -> None:
        """stats is called from the scraping thread; it only reads counts."""
        self.registry = CollectorRegistry()
        arena = exporter.gauge(STORE_ARENA_BYTES, self.registry)
        arena.labels("leased").set_function(lambda: stats().num_bytes_leased)
        arena.labels("cached").set_function(lambda: stats().num_bytes_cached)
        arena.labels("free").set_function(lambda: stats().num_bytes_free)
        ssd = exporter.gauge(STORE_SSD_BYTES, self.registry)
        ssd.labels("used").set_function(lambda: stats().num_bytes_ssd_used)
        ssd.labels("free").set_function(lambda: stats().num_bytes_ssd - stats().num_bytes_ssd_used)
        self._ssd_blocks = exporter.counter(STORE_SSD_BLOCKS, self.registry)
        exporter.gauge(STORE_LEASES, self.registry).set_function(lambda: stats().num_leases)
        exporter.gauge(STORE_HANDOFFS, self.registry).set_function(lambda: stats().num_handoffs)
        exporter.gauge(STORE_SESSIONS, self.registry).set_function(lambda: stats().num_sessions)
        self._evicted_blocks = exporter.counter(STORE_EVICTED_BLOCKS, self.registry)
        self._expired_leases = exporter.counter(STORE_EXPIRED_LEASES, self.registry)
        self._aborted_handoffs = exporter.counter(STORE_ABORTED_HANDOFFS, self.registry)
        self._replicated_blocks = exporter.counter(STORE_REPLICATED_BLOCKS, self.registry)
        self._replicated_bytes = exporter.counter(STORE_REPLICATED_BYTES, self.registry)
        self._replication_seconds = exporter.histogram(STORE_REPLICATION_SECONDS, self.registry)

    def evicted(self, num_blocks: int) -> None:
        self._evicted_blocks.inc(num_blocks)

    def expired(self, num_leases: int) -> None:
        self._expired_leases.inc(num_leases)

    def replicated(self, outcome: str, num_blocks: int, num_bytes: int, seconds: float) -> None:
        self._replicated_blocks.inc(num_blocks)
        self._replicated_bytes.inc(num_bytes)
        self._replication_seconds.labels(outcome).observe(seconds)

    def moved(self, outcome: str, num_blocks: int) -> None:
        self._ssd_blocks.labels(outcome).inc(num_blocks)

    def aborted(self, reason_code: str) -> None:
        self._aborted_handoffs.labels(reason_code).inc()
