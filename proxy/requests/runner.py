"""One admitted request on its way: the state machine, its attempts, the tokens that were sent.

             ┌──────────── failed leg: cancel the other, next epoch, prompt + sent tokens ────────────┐
             ▼                                                                                        │
place ─► QUEUED ─► PREFILL (both calls open) ─► HANDOFF (prefill done) ─► DECODE (decode admitted) ───┤
                      └──── local: one call, no hand-off, decode admits its own prefill ─────┘        │
                                                                                                      ▼
             one end, decided once and at once by finish(), fail() or cancel(): DONE | FAILED | ABORTED
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    HandoffError,
    InternalError,
    NoWorker,
    PromptTooLong,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
    build_error,
)
from ...protocol.v1 import common_pb2, worker_pb2
from ..metrics import ProxyMetrics
from ..request import Finished, ProxyRequest, RequestState, TokenEvent, Tokens
from ..tasks import Tasks
from ..tracing import Ended, Tracer
from .attempt import Attempt, LegFailed
from .decisions import RequestDecision
from .dispatcher import Dispatcher
from .learner import Learner
from .pair import Pair
from .phase_clock import PhaseClock

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # for the Finished that answers a Stop


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """What all runners share."""

    dispatcher: Dispatcher
    learner: Learner
    metrics: ProxyMetrics
    tasks: Tasks
    max_attempts: int
    eos_token_ids: frozenset[int]
    on_first_token: Callable[[RequestRunner], None]
    on_end: Callable[[RequestRunner], None]
    tracer: Tracer | None


class RequestRunner:
    """Placed by its maker; everything runs in the event loop that made it."""

    def __init__(self, request: ProxyRequest, decision: RequestDecision, pair: Pair, remaining_s: float, context: RunnerContext) -> None:
        self.request = request
        self.decision = decision
        self.state = RequestState.QUEUED
        self.is_waiting = True  # for its first token
        self.events: deque[TokenEvent] = deque()  # for the consumer; what came before an error is delivered before it
        self.error: HalfmoonError | None = None
        self.finished: Finished | None = None
        self.on_news: Callable[[], None] = _nobody  # something was added to events, or the runner ended; must not hold the TokenStream
        self.clock = PhaseClock(request.arrival, decision.terms, context.metrics, request.trace)
        self._context = context
        self._sent: list[int] = []
        self._pair = pair
        decision.record = self.clock.record
        self._attempt: Attempt | None = None
        self._epoch = 0
        self._exclude: set[str] = set()
        self._avoid: set[str] = set()
        self._stopping = False
        # a request id may come twice in a row, a hand-off id may not: its aborted epochs are remembered
        self._handoff_id = f"{request.request_id}.{uuid.uuid4().hex}"
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + remaining_s
        self._stop_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._settled = False
        context.metrics.entered(self.state)
        self._task = context.tasks.spawn(self._run(), f"request {request.request_id}", self._broke)

    @property
    def is_over(self) -> bool:
        return self._ended

    @property
    def is_settled(self) -> bool:
        """It is over, and has been judged."""
        return self._settled

    def cancel(self, reason: str) -> None:
        """Both workers and the store are told before this returns. Nobody waits for the end of a runner that is over."""
        if not self.is_over:
            self._end(RequestState.ABORTED, RequestCancelled(reason))
            self._task.cancel()
        else:
            self.settle()

    def settle(self, num_unwritten: int = 0) -> None:
        """Its consumer has taken Finished, and with it so many tokens that it writes now; or it takes no more. Idempotent.

        A request that came to its own end is measured and judged here, by what its client got.
        """
        if self._settled or self.finished is None:
            return
        self._settled = True
        if num_unwritten:
            self.clock.wrote(num_unwritten)
        verdict = self.clock.finished(self.finished.usage)
        self._context.metrics.ended(RequestState.DONE, _reason_name(self.finished.reason), verdict)
        usage = self.finished.usage
        self._traced(usage.num_completion_tokens, usage.num_cached_tokens, _reason_name(self.finished.reason), "")

    def abort(self, error: HalfmoonError) -> None:
        """As cancel, but it is the cluster that ends it, with error."""
        if not self.is_over:
            self._fail(error)
            self._task.cancel()

    def stop(self, num_taken_tokens: int) -> None:
        """Is to end as DONE/stop: Finished comes within a few seconds. num_taken_tokens of those sent were used, all others are dropped.

        Without effect on a runner that is over.
        """
        if self.is_over or self._stopping:
            return
        self._stopping = True
        del self._sent[num_taken_tokens:]
        self.events.clear()
        attempt = self._attempt
        if attempt is None or not attempt.admitted:
            self._finish_stopped()
            return
        attempt.stop(on_unheard=self._finish_stopped)
        self._stop_timer = self._loop.call_later(STOP_TIMEOUT_S, self._finish_stopped)

    # The run

    async def _run(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                finished = await self._run_attempts()
            reason = common_pb2.FINISH_REASON_STOP if self._stopping else finished.reason
            self._finish(reason, finished.phases)
        except TimeoutError:
            self._fail(
                DeadlineExceeded(f"the request's {self.request.timeout_s:g} s ran out in state {self.state}", state=self.state.value)
            )
        except HalfmoonError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self.cancel("the proxy is shutting down")  # without effect where cancel() or stop() is the cause
            raise

    def _broke(self, bug: Exception) -> None:
        """A bug must end the request, not hang it."""
        self._fail(InternalError(f"{type(bug).__name__}: {bug}; the proxy's log has the traceback"))

    async def _run_attempts(self) -> worker_pb2.DecodeReply.Finished:
        while True:
            attempt = self._start_attempt()
            try:
                return await attempt.outcome
            except LegFailed as failure:
                attempt.close(failure.error)
                if (reason := self._reached_end()) is not None:
                    return worker_pb2.DecodeReply.Finished(reason=reason)
                self._prepare_retry(failure)

    def _start_attempt(self) -> Attempt:
        request, pair = self.request, self._pair
        self.clock.placed(pair.placement)
        sequence = common_pb2.SequenceSpec(
            request_id=request.request_id,
            num_prompt_tokens=len(request.token_ids),
            sampling=request.sampling.to_proto(),
            deadline_s=max(self._deadline - self._loop.time(), 0.0),
            queue_order=pair.queue_order,
        )
        self._epoch += 1
        handoff = common_pb2.HandoffId(id=self._handoff_id, epoch=self._epoch)
        logger.debug("request %s epoch %d: %s", request.request_id, self._epoch, pair.placement.reason)
        self._attempt = Attempt(pair, sequence, handoff, self, self._context.tasks, request.trace)
        self._attempt.start()
        self._enter(RequestState.PREFILL)
        return self._attempt

    def _prepare_retry(self, failure: LegFailed) -> None:
        """Places the runner on another pair. Raises the failure's error, or NoWorker, where that is not possible."""
        error = failure.error
        if not error.retryable:
            raise error
        if self._epoch >= self._context.max_attempts:
            raise build_error(error.code, f"{error.message} (attempt {self._epoch} of {self._context.max_attempts})", error.fields_json)
        failed = failure.member
        self._pair.decided.error = error.message
        if failed.gone or isinstance(error, WorkerLost):
            self._exclude.add(failed.incarnation)
        elif isinstance(error, HandoffError):
            # what one side reports of a hand-off, the other side caused: its death may be known to the store first
            pair = self._pair
            self._avoid.add((pair.prefill if failed is pair.decode else pair.decode).incarnation)
        elif not isinstance(error, StoreUnavailable):
            self._avoid.add(failed.incarnation)
        logger.warning("request %s epoch %d failed, to be replayed: %s", self.request.request_id, self._epoch, error.message)
        self._enter(RequestState.QUEUED)
        try:
            self._pair = self._context.dispatcher.place_again(
                self.request, self._sent, self._pair, self.decision, frozenset(self._exclude), frozenset(self._avoid)
            )
        except (NoWorker, PromptTooLong) as none_left:
            raise NoWorker(f"{error.message}; nothing to replay it on: {none_left.message}", **error.fields) from error
        self._context.metrics.replayed(error.code)

    def _reached_end(self) -> common_pb2.FinishReason | None:
        """Why a sequence has all its tokens although its Finished was lost: one more would be a wrong one."""
        params = self.request.sampling
        if self._stopping:
            return common_pb2.FINISH_REASON_STOP
        if not self._sent:
            return None
        last = self._sent[-1]
        stops = last in params.stop_token_ids or (last in self._context.eos_token_ids and not params.ignore_eos)
        if stops and len(self._sent) >= params.min_tokens:
            return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if len(self._sent) >= params.max_tokens else None

    # What the attempt reports

    def on_prefilled(self, state: common_pb2.HandoffState) -> None:
        if self.state is not RequestState.PREFILL:
            return
        self.clock.prefilled()
        self._enter(RequestState.HANDOFF)
        # what decode took in before this was heard of has been admitted for good
        if error := self._context.dispatcher.judge_again(self._pair):
            self._end(RequestState.REJECTED, error)
            self._task.cancel()

    def on_admitted(self, state: common_pb2.HandoffState) -> None:
        if self._pair.is_local:
            self.clock.prefilled()
        elif self.state is RequestState.PREFILL:  # decode's word may overtake prefill's
            self.clock.prefilled()
            self._enter(RequestState.HANDOFF)
        if self.state in (RequestState.PREFILL, RequestState.HANDOFF):
            self.clock.admitted(state)
            if state.phases.transport == "grpc" and self._pair.handoff_link == "node":
                self._context.metrics.fell_back("transport")
            self._context.learner.prefilled(state, self._pair.num_loads)
            self._enter(RequestState.DECODE)

    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        if self._stopping:
            return
        if self.is_waiting:
            self._first_tokens()
        self._sent += token_ids
        self._pair.decode_assignment.grow(len(token_ids))
        self.events.append(Tokens(token_ids, outputs))
        self.on_news()

    def _first_tokens(self) -> None:
        self.is_waiting = False
        self._context.on_first_token(self)
        self.clock.first_came()
        if not self._pair.is_local:
            self._context.learner.handed_off(self.clock.record, self._pair.handoff_bytes, self._pair.handoff_link)

    # The end

    def _finish(self, reason: common_pb2.FinishReason, phases: common_pb2.DecodePhases) -> None:
        if self.is_over:
            return
        self.clock.decoded(phases)
        usage = common_pb2.Usage(
            num_prompt_tokens=len(self.request.token_ids),
            num_completion_tokens=len(self._sent),
            num_cached_tokens=min(self.clock.num_cached_tokens or 0, len(self.request.token_ids)),
        )
        self._context.dispatcher.finished(self._pair)
        self.finished = Finished(reason, self.clock.record, usage)
        self.events.append(self.finished)
        self._end(RequestState.DONE, None, _reason_name(reason))

    def _finish_stopped(self) -> None:
        if not self.is_over:
            self._finish(common_pb2.FINISH_REASON_STOP, common_pb2.DecodePhases())
            self._task.cancel()

    def _fail(self, error: HalfmoonError) -> None:
        if self._stopping:
            self._finish(common_pb2.FINISH_REASON_STOP, common_pb2.DecodePhases())  # the client has all its text
        elif not self.is_over:
            self._end(RequestState.FAILED, error)

    def _end(self, state: RequestState, error: HalfmoonError | None, reason: str = "") -> None:
        self.error = error
        if self._attempt is not None:
            self._attempt.close(error or RequestCancelled(f"request {self.request.request_id} has ended"))
        self._pair.release()  # placed, and perhaps not started
        self._enter(state)
        if error is not None:
            self._settled = True
            left = state is RequestState.ABORTED
            verdict = self.clock.left() if left else self.clock.failed(error, rejected=state is RequestState.REJECTED)
            self._context.metrics.ended(state, error.code, verdict)
            self._traced(len(self._sent), self.clock.num_cached_tokens or 0, "", error.code)
        self.decision.end(state, f"{error.code}: {error.message}" if error is not None else reason)
        self._ended = True
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        self.on_news()
        self._context.on_end(self)

    def _traced(self, num_tokens: int, num_cached_tokens: int, reason: str, error_code: str) -> None:
        if self._context.tracer is not None:
            self._context.tracer.ended(self.request, Ended(self.clock.record, num_tokens, num_cached_tokens, reason, error_code))

    def _enter(self, state: RequestState) -> None:
        self.state = state
        self.decision.state = state.value
        self._context.metrics.entered(state)


def _reason_name(reason: common_pb2.FinishReason) -> str:
    return common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def _nobody() -> None:
    """Until a consumer comes."""
