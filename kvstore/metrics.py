"""The store's Prometheus metrics: gauges that read the lease manager when scraped, counters fed by its events."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..protocol import exporter
from ..protocol.metrics import (
    STORE_ABORTED_HANDOFFS,
    STORE_ARENA_BYTES,
    STORE_ARENA_CAPACITY,
    STORE_EVICTED_BLOCKS,
    STORE_EXPIRED_LEASES,
    STORE_HANDOFFS,
    STORE_HIT_BLOCKS,
    STORE_LEASES,
    STORE_QUERY_BLOCKS,
    STORE_REPLICATED_BLOCKS,
    STORE_REPLICATED_BYTES,
    STORE_REPLICATION_SECONDS,
    STORE_SESSIONS,
    STORE_SSD_BLOCKS,
    STORE_SSD_BYTES,
)
from ..protocol.v1 import kvstore_pb2


class _StatsCollector(Collector):
    """All counts of one moment: bytes of the arena read one by one would not add up while blocks come and go."""

    def __init__(self, stats: Callable[[], kvstore_pb2.StatsReply]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        arena = GaugeMetricFamily(STORE_ARENA_BYTES.name, STORE_ARENA_BYTES.help, labels=STORE_ARENA_BYTES.labels)
        arena.add_metric(["leased"], stats.num_bytes_leased)
        arena.add_metric(["cached"], stats.num_bytes_cached)
        arena.add_metric(["free"], stats.num_bytes_free)
        yield arena
        ssd = GaugeMetricFamily(STORE_SSD_BYTES.name, STORE_SSD_BYTES.help, labels=STORE_SSD_BYTES.labels)
        ssd.add_metric(["used"], stats.num_bytes_ssd_used)
        ssd.add_metric(["free"], stats.num_bytes_ssd - stats.num_bytes_ssd_used)
        yield ssd
        for spec, value in (
            (STORE_ARENA_CAPACITY, stats.num_bytes_arena),
            (STORE_LEASES, stats.num_leases),
            (STORE_HANDOFFS, stats.num_handoffs),
            (STORE_SESSIONS, stats.num_sessions),
        ):
            yield GaugeMetricFamily(spec.name, spec.help, value=value)
        for spec, value in ((STORE_QUERY_BLOCKS, stats.num_query_blocks), (STORE_HIT_BLOCKS, stats.num_hit_blocks)):
            yield CounterMetricFamily(spec.name, spec.help, value=value)


class StoreMetrics:
    def __init__(self, stats: Callable[[], kvstore_pb2.StatsReply]) -> None:
        """stats is called from the scraping thread; it only reads counts."""
        self.registry = CollectorRegistry()
        self.registry.register(_StatsCollector(stats))
        self._ssd_blocks = exporter.counter(STORE_SSD_BLOCKS, self.registry)
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
