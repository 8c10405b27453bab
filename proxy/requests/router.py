"""The proxy's core: admits a request, flies it over a pair of workers, knows every request that is under way.

open ─► draining? room? a pair? ─► RequestRunner ─► TokenStream        drain ─► admits no more, waits for the last
             └─ no: Draining | Overloaded | NoWorker
"""

from __future__ import annotations

import asyncio
import random
import time
import weakref
from collections.abc import Sequence

from ...protocol.config import ProxyConfig
from ...protocol.errors import Draining, HalfmoonError, InvalidRequest
from ...protocol.schema import KVSchema
from ..members.cluster import Cluster
from ..metrics import ProxyMetrics
from ..prefixes.index import PrefixIndex
from ..prefixes.replicator import Replicator
from ..prefixes.watch import PrefixWatch
from ..request import ProxyRequest, RequestState
from .admission_queue import AdmissionQueue, Waiting
from .decisions import DecisionLog
from .dispatcher import Dispatcher
from .learner import Learner
from .pair import Pair
from .runner import RequestRunner, RunnerContext
from .scheduling import create_conductor, create_predictors, default_slo
from .token_stream import TokenStream


class Router:
    def __init__(self, config: ProxyConfig, cluster: Cluster, metrics: ProxyMetrics, *, eos_token_ids: frozenset[int]) -> None:
        """eos_token_ids: the model's; a replay must not go on behind one. Made before the first member joins the cluster.

        Raises ConfigError for a cost model that cannot be read.
        """
        self.config = config
        self.cluster = cluster
        self.metrics = metrics
        self.draining = False
        self.streams: weakref.WeakValueDictionary[str, TokenStream] = weakref.WeakValueDictionary()  # by request id, under way
        self.decisions = DecisionLog(config.num_explained)
        self._queue = AdmissionQueue(config.max_queued_requests, config.max_queued_tokens)
        self._waiting: dict[str, Waiting] = {}  # by request id
        self._runners: dict[str, RequestRunner] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        index = PrefixIndex()
        self._watch = PrefixWatch(cluster, index)
        self._replicator = Replicator(cluster, index, metrics.registry, replicate=config.replicate)
        self.predictors = create_predictors(config, cluster)
        self.learner = Learner(self.predictors, metrics)
        cluster.on_report(self.learner.reported)
        # any seed will do here: tests and the simulator give policies theirs
        self.conductor = create_conductor(config, self.predictors, random.Random())
        self._dispatcher = Dispatcher(
            cluster,
            index,
            self.conductor,
            self.learner,
            metrics,
            self._replicator,
            slo=default_slo(config),
            order=config.order,
            profiled=bool(config.cost_model),
        )
        self._context = RunnerContext(
            self._dispatcher,
            self.learner,
            metrics,
            config.max_attempts,
            eos_token_ids,
            on_first_token=self._first_token,
            on_end=self._runner_ended,
        )

    @property
    def schema(self) -> KVSchema | None:
        """None before the first worker joined."""
        return self.cluster.schema

    @property
    def max_model_len(self) -> int:
        """0 before the first worker joined."""
        return self.cluster.max_model_len

    @property
    def allows_local_prefill(self) -> bool:
        """A cluster without prefill workers serves, too."""
        return self.conductor.local_prefill != "never"

    @property
    def num_queued(self) -> int:
        """Requests without a first token."""
        return self._queue.num_requests

    @property
    def num_running(self) -> int:
        return len(self._runners) - self._queue.num_requests

    def open(self, request: ProxyRequest) -> TokenStream:
        """Starts the request. Called in the event loop.

        Raises Draining, Overloaded (with retry_after_s), NoWorker, PromptTooLong, or InvalidRequest for a request id that
        is under way: nothing was started then.
        """
        return self.open_all([request])[0]

    def open_all(self, requests: Sequence[ProxyRequest]) -> list[TokenStream]:
        """The choices of one request: all are started, or none is. Raises as open does."""
        try:
            pairs = self._admit(requests)
        except HalfmoonError as error:
            self.metrics.entered(RequestState.REJECTED)
            self.metrics.ended(RequestState.REJECTED, error.code)
            raise
        return [self._start(request, pair) for request, pair in zip(requests, pairs, strict=True)]

    def require_room(self, num_requests: int, num_tokens: int) -> None:
        """Whether so many requests with so many prompt tokens together would be let into the queue. Raises Draining, Overloaded."""
        if self.draining:
            self.metrics.rejected("drain", "draining")
            raise Draining("the proxy is draining: it finishes what it has and admits no more; ask another")
        try:
            self._queue.require_room(num_requests, num_tokens)
        except HalfmoonError as error:
            self.metrics.rejected("queue", error.code)
            raise

    def cancel(self, request_id: str, reason: str) -> bool:
        """Whether such a request was under way."""
        runner = self._runners.get(request_id)
        if runner is not None:
            runner.cancel(reason)
        return runner is not None

    async def drain(self, timeout_s: float) -> int:
        """Admits no more, and returns when no request is left. Those that need longer are ended; returns how many."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            pass  # the answer says how many
        late = list(self._runners.values())
        for runner in late:
            runner.abort(Draining(f"the cluster is shutting down and its drain of {timeout_s:g} s is over; ask again, elsewhere or later"))
        return len(late)

    async def close(self) -> None:
        """Cancels what is under way and leaves the stores. The cluster is its maker's to close."""
        self.draining = True
        for runner in list(self._runners.values()):
            runner.cancel("the proxy is shutting down")
        await self._replicator.close()
        await self._watch.close()

    def _admit(self, requests: Sequence[ProxyRequest]) -> list[Pair]:
        """A booked pair for each, or an error and none."""
        for request in requests:
            if request.request_id in self._runners:
                raise InvalidRequest(f"request id {request.request_id!r} is under way already; choose another", param="request_id")
        decisions = [self.decisions.open(request, self._dispatcher.slo(request)) for request in requests]
        pairs: list[Pair] = []
        try:
            self.require_room(len(requests), sum(len(request.token_ids) for request in requests))
            for request, decision in zip(requests, decisions, strict=True):
                pairs.append(self._dispatcher.place(request, decision))
        except HalfmoonError as error:
            for pair in pairs:
                pair.release()
            for decision in decisions:
                decision.end(RequestState.REJECTED, f"{error.code}: {error.message}")
            raise
        return pairs

    def _start(self, request: ProxyRequest, pair: Pair) -> TokenStream:
        now_s, num_tokens = time.monotonic(), len(request.token_ids)
        runner = RequestRunner(request, pair, request.timeout_s - (now_s - request.arrival), self._context)
        self._runners[request.request_id] = runner
        self._empty.clear()
        ttft_s = pair.placement.ttft_s if self.learner.knows else None
        self._waiting[request.request_id] = self._queue.enter(num_tokens, None if ttft_s is None else now_s + ttft_s)
        self.metrics.admitted(num_tokens)
        self._count()
        stream = self.streams[request.request_id] = TokenStream(runner)
        return stream

    def _first_token(self, runner: RequestRunner) -> None:
        self._queue.leave(self._waiting.pop(runner.request.request_id), first_token=True)
        self._count()

    def _runner_ended(self, runner: RequestRunner) -> None:
        if runner.is_waiting:
            self._queue.leave(self._waiting.pop(runner.request.request_id), first_token=False)
        del self._runners[runner.request.request_id]
        self.streams.pop(runner.request.request_id, None)
        if not self._runners:
            self._empty.set()
        self._count()

    def _count(self) -> None:
        self.metrics.set_requests(self.num_queued, self.num_running)
