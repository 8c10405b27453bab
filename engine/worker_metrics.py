"""What a worker exports, under the label of the half that did it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry

from ..protocol import metrics
from ..protocol.exporter import counter, gauge, histogram
from .executor import ExecutorFacts
from .model_flops import ModelFlops, StepWork
from .page_allocator import PageAllocator


class Queue(Protocol):
    """A scheduler."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class WorkerMetrics:
    def __init__(self, model_flops: ModelFlops) -> None:
        self.registry = CollectorRegistry()
        self._model_flops = model_flops
        self._running = gauge(metrics.NUM_REQUESTS_RUNNING, self.registry)
        self._waiting = gauge(metrics.NUM_REQUESTS_WAITING, self.registry)
        self._usage = gauge(metrics.KV_CACHE_USAGE, self.registry)
        self._capacity = gauge(metrics.KV_CACHE_CAPACITY, self.registry)
        self._memory = gauge(metrics.ENGINE_MEMORY, self.registry)
        self._flops = counter(metrics.MODEL_FLOPS, self.registry)
        self._oldest_step = gauge(metrics.OLDEST_STEP_AGE, self.registry)
        self._step_seconds = histogram(metrics.STEP_SECONDS, self.registry)
        self._step_tokens = counter(metrics.STEP_TOKENS, self.registry)
        self._step_sequences = histogram(metrics.STEP_SEQUENCES, self.registry)
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
        self._step_seconds.labels(half)
        self._step_tokens.labels(half)
        self._step_sequences.labels(half)

    def watch_engine(self, facts: ExecutorFacts, allocator: PageAllocator, oldest_step_age_s: Callable[[], float]) -> None:
        """oldest_step_age_s: called by the scraping thread, so that a step loop that hangs is seen."""
        self._usage.set_function(lambda: allocator.usage_ratio)
        self._oldest_step.set_function(oldest_step_age_s)
        self._capacity.set(facts.num_pages * facts.page_size)
        self._memory.labels("weights").set(facts.weight_bytes)
        self._memory.labels("kv_cache").set(facts.num_pages * facts.schema.block_bytes)
        if facts.peak_flops is not None:
            gauge(metrics.DEVICE_PEAK_FLOPS, self.registry).set(facts.peak_flops)

    def stepped(self, half: str, seconds: float, work: StepWork) -> None:
        """seconds: of the whole step, whatever the other half had in it."""
        self._step_seconds.labels(half).observe(seconds)
        self._step_tokens.labels(half).inc(work.num_tokens)
        self._step_sequences.labels(half).observe(work.num_sequences)
        self._flops.inc(self._model_flops.of_step(work))

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
