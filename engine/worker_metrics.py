"""What a worker exports, under the label of the half that did it."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry

from ..protocol import metrics
from ..protocol.exporter import counter, gauge, histogram
from .page_allocator import PageAllocator


class Queue(Protocol):
    """A scheduler."""

    allocator: PageAllocator

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class WorkerMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running = gauge(metrics.NUM_REQUESTS_RUNNING, self.registry)
        self._waiting = gauge(metrics.NUM_REQUESTS_WAITING, self.registry)
        self._usage = gauge(metrics.KV_CACHE_USAGE, self.registry)
        self._step_seconds = histogram(metrics.STEP_SECONDS, self.registry)
        self._step_tokens = counter(metrics.STEP_TOKENS, self.registry)
        self._failed = counter(metrics.SEQUENCES_FAILED, self.registry)
        self._transfer_bytes = counter(metrics.KV_TRANSFER_BYTES, self.registry)
        self._transfer_seconds = histogram(metrics.KV_TRANSFER_SECONDS, self.registry)
        self._prefix_queries = counter(metrics.PREFIX_CACHE_QUERIES, self.registry)
        self._prefix_hits = counter(metrics.PREFIX_CACHE_HITS, self.registry)
        self._prefix_failures = counter(metrics.PREFIX_LOAD_FAILURES, self.registry)

    def watch(self, half: str, queue: Queue) -> None:
        """From now on there are gauges of it, and counters from 0. Idempotent.

        Read when Prometheus asks; each is the length of collections, so without the scheduler's lock.
        """
        self._running.labels(half).set_function(lambda: queue.num_running)
        self._waiting.labels(half).set_function(lambda: queue.num_waiting)
        self._usage.labels(half).set_function(lambda: queue.allocator.usage_ratio)
        self._step_seconds.labels(half)
        self._step_tokens.labels(half)

    def stepped(self, half: str, seconds: float, num_tokens: int) -> None:
        """seconds: of the whole step, whatever the other half had in it."""
        self._step_seconds.labels(half).observe(seconds)
        self._step_tokens.labels(half).inc(num_tokens)

    def failed(self, half: str, code: str) -> None:
        """A step gave a sequence no token. code: of the error that ended it."""
        self._failed.labels(half, code).inc()

    def transferred(self, transport: str, direction: str, num_bytes: int, seconds: float) -> None:
        """direction: fetch | load | push | cache."""
        self._transfer_bytes.labels(transport, direction).inc(num_bytes)
        self._transfer_seconds.labels(transport, direction).observe(seconds)

    def prefix(self, tier: str, num_queried: int, num_hit: int) -> None:
        """Tokens. tier: hbm (the worker's own pages) | local | remote, where they were found or last looked for."""
        self._prefix_queries.labels(tier).inc(num_queried)
        self._prefix_hits.labels(tier).inc(num_hit)

    def prefix_failed(self, code: str) -> None:
        self._prefix_failures.labels(code).inc()
