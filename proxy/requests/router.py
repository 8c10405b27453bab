"""The proxy's core: admits requests, starts each on a pair of workers, and knows all that are under way.

open ─► draining? room? a pair? ─► RequestRunner ─► TokenStream        drain ─► admits no more, waits for the last
             └─ no: Draining | Overloaded | NoWorker
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import weakref
from collections.abc import Generator, Iterator, Sequence

from ...protocol.config import ProxyConfig
from ...protocol.errors import Draining, HalfmoonError, InvalidRequest
from ...protocol.schema import KVSchema
from ...protocol.tasks import Tasks
from ..conductor.placement import Slo
from ..members.cluster import Cluster
from ..members.liveness import Liveness
from ..members.rebalancer import NotedChange
from ..metrics import ProxyMetrics
from ..prefixes.index import PrefixIndex
from ..prefixes.kv_event_sockets import KvEventSockets
from ..prefixes.page_watch import PageWatch
from ..prefixes.promoter import Promoter
from ..prefixes.replicator import Replicator
from ..prefixes.watch import PrefixWatch
from ..request import ProxyRequest, RequestState
from ..tracing import Tracer
from ..verdict import Verdict, judge_error, judge_left
from .admission_queue import AdmissionQueue, Waiting
from .assigner import Assigner
from .comings import Comings
from .decisions import DecisionLog, RequestDecision
from .dispatcher import Dispatcher
from .learner import Learner
from .pair import Pair
from .prompt import Prompt, PromptEncoder
from .runner import RequestRunner, RunnerContext
from .scheduling import create_conductor, create_placer, create_predictors, create_rebalancer, default_slo
from .token_stream import TokenStream

SLICE_S = 0.002  # of opening many or long choices before the event loop serves others
CLOSE_GRACE_S = 1.0  # for aborts still being sent


class Router:
    def __init__(
        self, config: ProxyConfig, cluster: Cluster, metrics: ProxyMetrics, *, eos_token_ids: frozenset[int], tracer: Tracer | None = None
    ) -> None:
        """eos_token_ids: the model's; a replay must not go past one. tracer: None where tracing is off.

        The router is made before the first member joins the cluster.

        Raises ConfigError for a cost model that cannot be read.
        """
        self.config = config
        self.cluster = cluster
        self.metrics = metrics
        self.tracer = tracer
        self.draining = False
        self.streams: weakref.WeakValueDictionary[str, TokenStream] = weakref.WeakValueDictionary()  # by request id, under way
        self.decisions = DecisionLog(config.num_explained)
        self._queue = AdmissionQueue(config.max_queued_requests, config.max_queued_tokens)
        self._opening: dict[str, Waiting] = {}  # by request id: being placed
        self._waiting: dict[str, Waiting] = {}  # by request id: started, without a first token
        self._runners: dict[str, RequestRunner] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks = Tasks("router")
        self._index = PrefixIndex()
        self._watch = PrefixWatch(cluster, self._index)
        self.kv_events = _kv_events(config, self._index)
        page_index = PrefixIndex()
        self._page_watch = PageWatch(cluster, page_index)
        self.liveness = Liveness(cluster, config)
        self._replicator = Replicator(cluster, self._index, metrics.registry, replicate=config.replicate)
        self.predictors = create_predictors(config, cluster)
        self.learner = Learner(self.predictors, metrics)
        cluster.on_report(self.learner.reported)
        self._promoter = Promoter(cluster, self.learner, metrics.registry)
        # any seed will do here: tests and the simulator give policies theirs
        self.conductor = create_conductor(config, self.predictors, random.Random())
        self._rebalancer = create_rebalancer(config, cluster, self.conductor, metrics)
        self._placer = create_placer(config, cluster, self._index, page_index, self.conductor, self.learner)
        self._prompts = PromptEncoder(cluster)
        assigner = Assigner(cluster, self._index, page_index, self._placer.load_tracker, self._replicator, self._promoter)
        self._dispatcher = Dispatcher(self._prompts, self._placer, assigner, metrics)
        self._slo = default_slo(config)
        self._context = RunnerContext(
            self._dispatcher,
            Comings(cluster),
            self.learner,
            metrics,
            self._tasks,
            config.max_attempts,
            eos_token_ids,
            on_first_token=self._first_token,
            on_end=self._runner_ended,
            tracer=tracer,
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
        """True if a cluster without prefill workers can serve."""
        return self.conductor.local_prefill != "never"

    @property
    def num_queued(self) -> int:
        """Requests without a first token, those that are being placed included."""
        return self._queue.num_requests

    @property
    def num_running(self) -> int:
        return len(self._runners) - len(self._waiting)

    @property
    def role_changes(self) -> Sequence[NotedChange]:
        """The last ones, the latest first. Empty under a policy that leaves workers their roles."""
        return () if self._rebalancer is None else list(self._rebalancer.noted)

    def under_way(self) -> Iterator[RequestDecision]:
        """The latest start first. To be read to its end before the event loop goes on."""
        return (runner.decision for runner in reversed(self._runners.values()))

    def open(self, request: ProxyRequest) -> TokenStream:
        """Starts the request. Called in the event loop.

        Raises Draining, Overloaded (with retry_after_s), NoWorker, PromptTooLong, or InvalidRequest for a request id that
        is under way. Nothing was started then.
        """
        opening = self._open([request])
        while True:
            try:
                next(opening)
            except StopIteration as done:
                return done.value[0]

    async def open_all(self, requests: Sequence[ProxyRequest]) -> list[TokenStream]:
        """Starts all choices of one request, or none. Raises as open does.

        The event loop serves others meanwhile, however many and long they are. Choices of one prompt share the same token_ids object.
        """
        opening = self._open(requests)
        begun_s = time.monotonic()
        try:
            while True:
                has_started = next(opening)
                if has_started or time.monotonic() - begun_s >= SLICE_S:  # a started request gets a turn of its own
                    await asyncio.sleep(0)
                    begun_s = time.monotonic()
        except StopIteration as done:
            return done.value
        finally:
            opening.close()  # undoes everything if the caller was cancelled

    def require_room(self, num_requests: int, num_tokens: int) -> None:
        """Raises Draining or Overloaded unless the queue takes num_requests with num_tokens prompt tokens together."""
        self._require_open()
        try:
            self._queue.require_room(num_requests, num_tokens)
        except HalfmoonError as error:
            self.metrics.rejected("queue", error.code)
            raise

    def _require_open(self) -> None:
        if self.draining:
            self.metrics.rejected("drain", "draining")
            raise Draining("the proxy is draining: it finishes what it has and admits no more; ask another")

    def cancel(self, request_id: str, reason: str) -> bool:
        """True if such a request was under way."""
        runner = self._runners.get(request_id)
        if runner is not None:
            runner.cancel(reason)
        return runner is not None

    async def drain(self, timeout_s: float) -> int:
        """Admits no more and returns when no request is left. Ends those that need longer than timeout_s; returns how many."""
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
        """Cancels what is under way and leaves the stores. Does not close the cluster."""
        self.draining = True
        for runner in list(self._runners.values()):
            runner.cancel("the proxy is shutting down")
        await self._tasks.close(CLOSE_GRACE_S)
        if self._rebalancer is not None:
            await self._rebalancer.close()
        await self._replicator.close()
        await self._promoter.close()
        if self.kv_events is not None:
            await self.kv_events.close()
        await self._watch.close()
        await self._page_watch.close()
        await self.liveness.close()

    def _open(self, requests: Sequence[ProxyRequest]) -> Generator[bool, None, list[TokenStream]]:
        """Yields between short pieces of work and returns the streams. If it ends before that, everything it did is undone.

        Yields True if the piece of work started a request.
        """
        decisions: list[RequestDecision] = []
        try:
            with contextlib.ExitStack() as undo:
                self._reserve(requests, decisions, undo)
                pairs: list[Pair] = []
                prompts: dict[int, Prompt] = {}  # by the identity of the token ids, which requests keep alive
                for request, decision in zip(requests, decisions, strict=True):
                    prompt = prompts.get(id(request.token_ids))
                    if prompt is None:
                        prompt = prompts[id(request.token_ids)] = yield from self._prompts.encode_in_parts(request.token_ids, request.salt)
                        yield False
                    self._require_open()
                    pairs.append(self._dispatcher.place(request, prompt, decision))
                    undo.callback(pairs[-1].release)
                    yield False
                streams: list[TokenStream] = []
                for request, decision, pair in zip(requests, decisions, pairs, strict=True):
                    self._require_open()
                    streams.append(self._start(request, decision, pair))
                    undo.callback(self.cancel, request.request_id, "another choice of its request could not be started")
                    yield True
                undo.pop_all()
                return streams
        except BaseException as error:
            self._not_opened(decisions, error)
            raise

    def _reserve(self, requests: Sequence[ProxyRequest], decisions: list[RequestDecision], undo: contextlib.ExitStack) -> None:
        """Takes the ids and the room in the queue, so that requests which come between two pieces of work find them taken."""
        for request in requests:
            if request.request_id in self._runners or request.request_id in self._opening:
                raise InvalidRequest(f"request id {request.request_id!r} is under way already; choose another", param="request_id")
        decisions += [self.decisions.open(request, self._slo_of(request)) for request in requests]
        self.require_room(len(requests), sum(len(request.token_ids) for request in requests))
        for request in requests:
            self._opening[request.request_id] = self._queue.enter(len(request.token_ids))
            undo.callback(self._give_back, request.request_id)

    def _give_back(self, request_id: str) -> None:
        waiting = self._opening.pop(request_id, None)
        if waiting is not None:  # else it was started
            self._queue.leave(waiting, first_token=False)

    def _not_opened(self, decisions: list[RequestDecision], error: BaseException) -> None:
        if isinstance(error, HalfmoonError):
            state, code, why = RequestState.REJECTED, error.code, error.message
        elif isinstance(error, GeneratorExit):
            state, code, why = RequestState.ABORTED, "cancelled", "the client left before it was placed"
        else:
            state, code, why = RequestState.FAILED, "internal", f"{type(error).__name__}: {error}"
        for decision in decisions:
            self.metrics.entered(state)
            self.metrics.ended(state, code, self._verdict(decision, state, error))
            decision.end(state, f"{code}: {why}")

    def _verdict(self, decision: RequestDecision, state: RequestState, error: BaseException) -> Verdict:
        if state is RequestState.ABORTED:
            return judge_left(decision.terms, time.monotonic() - decision.arrival)
        known = error if isinstance(error, HalfmoonError) else None
        return judge_error(decision.terms, known, rejected=state is RequestState.REJECTED)

    def _slo_of(self, request: ProxyRequest) -> Slo:
        """The request's own SLO, if it has one, else the proxy's."""
        ttft_s, tpot_s = request.ttft_slo_s, request.tpot_slo_s
        return Slo(self._slo.ttft_s if ttft_s is None else ttft_s, self._slo.tpot_s if tpot_s is None else tpot_s)

    def _start(self, request: ProxyRequest, decision: RequestDecision, pair: Pair) -> TokenStream:
        now_s, request_id = time.monotonic(), request.request_id
        runner = RequestRunner(request, decision, pair, request.timeout_s - (now_s - request.arrival), self._context)
        self._runners[request_id] = runner
        self._empty.clear()
        waiting = self._waiting[request_id] = self._opening.pop(request_id)
        if self.learner.knows and pair.placement.ttft_s is not None:
            waiting.first_token_s = now_s + pair.placement.ttft_s
        self.metrics.admitted(len(request.token_ids))
        self._count()
        stream = self.streams[request_id] = TokenStream(runner)
        return stream

    def _first_token(self, runner: RequestRunner) -> None:
        self._queue.leave(self._waiting.pop(runner.request.request_id), first_token=True)
        self._tell_tokens(runner)
        self._count()

    def _runner_ended(self, runner: RequestRunner) -> None:
        if runner.is_waiting:
            self._queue.leave(self._waiting.pop(runner.request.request_id), first_token=False)
        del self._runners[runner.request.request_id]
        self._tell_tokens(runner)
        self.streams.pop(runner.request.request_id, None)
        if not self._runners:
            self._empty.set()
        self._count()

    def _tell_tokens(self, runner: RequestRunner) -> None:
        """Of a prompt, and of its answer so far, to who publishes events about blocks. A tenant's are nobody's business."""
        if self.kv_events is not None and not runner.prompt.salt:
            self.kv_events.know(runner.prompt.schema, runner.prompt.keys, [*runner.request.token_ids, *runner.sent])

    def _count(self) -> None:
        self.metrics.set_requests(self.num_queued, self.num_running)


def _kv_events(config: ProxyConfig, index: PrefixIndex) -> KvEventSockets | None:
    if not config.kv_events_endpoint:
        return None
    return KvEventSockets(index, config.kv_events_endpoint, config.kv_events_replay_endpoint, config.kv_events_topic)
