"""Runs one admitted request: its state, its attempts, the tokens that were sent.

             ┌──────────── failed leg: cancel the other, next epoch, prompt + sent tokens ────────────┐
             ▼                                                                                        │
place ─► QUEUED ─► PREFILL (both calls open) ─► HANDOFF (prefill done) ─► DECODE (decode admitted) ───┤
           ▲ │        └──── local: one call, no hand-off, decode admits its own prefill ─────┘        │
           └─┴ after a failed leg, while nobody else can serve: waits for a member to come            │
                                                                                                      ▼
             one end, decided once by finish(), fail() or cancel(), with immediate effect: DONE | FAILED | ABORTED
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    HandoffError,
    InternalError,
    NoWorker,
    PromptTooLong,
    RequestCancelled,
    RequestQuarantined,
    SequenceFailed,
    WorkerLost,
    build_error,
)
from ...protocol.tasks import Tasks
from ...protocol.v1 import common_pb2, worker_pb2
from ..metrics import ProxyMetrics
from ..request import Finished, ProxyRequest, RequestState, TokenEvent, Tokens
from ..tracing import Ended, Tracer
from .attempt import Attempt, LegFailed
from .comings import Comings
from .decisions import RequestDecision
from .dispatcher import Dispatcher
from .learner import Learner
from .pair import Pair
from .phase_clock import PhaseClock
from .prompt import Prompt

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # for the Finished that answers a Stop
MAX_BREAKS = 2  # workers that may break while they compute a request; it is not given to another then


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """Shared by all runners."""

    dispatcher: Dispatcher
    comings: Comings
    learner: Learner
    metrics: ProxyMetrics
    tasks: Tasks
    max_attempts: int
    eos_token_ids: frozenset[int]
    on_first_token: Callable[[RequestRunner], None]
    on_end: Callable[[RequestRunner], None]
    tracer: Tracer | None


class RequestRunner:
    """Already placed when it is made. Everything runs in the event loop that made it."""

    def __init__(self, request: ProxyRequest, decision: RequestDecision, pair: Pair, remaining_s: float, context: RunnerContext) -> None:
        self.request = request
        self.decision = decision
        self.state = RequestState.QUEUED
        self.is_waiting = True  # for its first token
        self.events: deque[TokenEvent] = deque()  # for the consumer; events before an error are delivered first
        self.error: HalfmoonError | None = None
        self.finished: Finished | None = None
        self.prompt_logprobs: list[common_pb2.PromptLogprobs] = []  # in order, all before the first tokens; none where not asked for
        self.on_news: Callable[[], None] = _nobody  # called after an event or the end; must not hold the TokenStream
        self.clock = PhaseClock(request.arrival, decision.terms, context.metrics, request.trace)
        self._context = context
        self._sent: list[int] = []
        self._pair = pair
        decision.record = self.clock.record
        self._attempt: Attempt | None = None
        self._epoch = 0
        self._num_failed = 0  # attempts; those that a store's death ended don't count
        self._num_breaks = 0  # workers that broke while they computed it
        self._waits_because = ""
        self._exclude: set[str] = set()
        self._avoid: set[str] = set()
        self._stopping = False
        # a client may use a request id again, but a hand-off id must be new: stores remember its aborted epochs
        self._handoff_id = f"{request.request_id}.{uuid.uuid4().hex}"
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + remaining_s
        self._stop_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._settled = False
        context.metrics.entered(self.state)
        self._task = context.tasks.spawn(self._run(), f"request {request.request_id}", self._broke)

    @property
    def prompt(self) -> Prompt:
        """Of the last attempt."""
        return self._pair.prompt

    @property
    def sent(self) -> Sequence[int]:
        """Tokens of the answer so far."""
        return self._sent

    @property
    def is_over(self) -> bool:
        return self._ended

    @property
    def is_settled(self) -> bool:
        """It is over, and has been judged."""
        return self._settled

    def cancel(self, reason: str) -> None:
        """When it returns, both workers' calls are cancelled and the store's abort is on its way. Does nothing on a runner that is over."""
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
        """As cancel, but the cluster ends the request, with this error."""
        if not self.is_over:
            self._fail(error)
            self._task.cancel()

    def stop(self, num_taken_tokens: int) -> None:
        """Ends the request as DONE/stop; Finished comes within a few seconds. Tokens after the first num_taken_tokens are dropped.

        Does nothing on a runner that is over.
        """
        if self.is_over or self._stopping:
            return
        self._stopping = True
        del self._sent[num_taken_tokens:]
        self.events.clear()
        attempt = self._attempt
        if attempt is None or attempt.closed or not attempt.admitted:
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
            ran_out = f"the request's {self.request.timeout_s:g} s ran out in state {self.state}"
            because = f": {self._waits_because}" if self._waits_because else ""
            self._fail(DeadlineExceeded(f"{ran_out}{because}", state=self.state.value))
        except HalfmoonError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self.cancel("the proxy is shutting down")  # does nothing if cancel() or stop() is the cause
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
                self._give_up(failure)
                await self._place_again(failure.error)

    def _start_attempt(self) -> Attempt:
        request, pair = self.request, self._pair
        self.clock.placed(pair.placement)
        sampling = request.sampling.to_proto()
        if self._sent:
            sampling.ClearField("num_prompt_logprobs")  # they came before the tokens
        sequence = common_pb2.SequenceSpec(
            request_id=request.request_id,
            num_prompt_tokens=len(request.token_ids),
            sampling=sampling,
            deadline_s=max(self._deadline - self._loop.time(), 0.0),
            queue_order=pair.queue_order,
            tpot_slo_s=tpot_s if math.isfinite(tpot_s := self.decision.slo.tpot_s) else 0.0,
            suspect=self._num_breaks > 0,
            priority=request.priority,
        )
        if not self._sent and math.isfinite(due := self.decision.first_token_due):
            sequence.first_token_due_s = due - time.monotonic()
        self._epoch += 1
        if not self._sent:
            self.prompt_logprobs.clear()  # of an attempt that failed
        handoff = common_pb2.HandoffId(id=self._handoff_id, epoch=self._epoch)
        logger.debug("request %s epoch %d: %s", request.request_id, self._epoch, pair.placement.reason)
        self._attempt = Attempt(pair, sequence, handoff, self, self._context.tasks, request.trace)
        self._attempt.start()
        self._enter(RequestState.PREFILL)
        return self._attempt

    def _give_up(self, failure: LegFailed) -> None:
        """Notes what the next attempt has to know of this one. Raises the failure's error where there is to be no other."""
        error, failed, limit = failure.error, failure.member, self._context.max_attempts
        if not error.retryable:
            raise error
        self._count_break(error)
        self._num_failed += failed is not self._pair.store  # a store dies no sooner for being tried again
        if self._num_failed >= limit:
            raise build_error(error.code, f"{error.message} (attempt {self._num_failed} of {limit})", error.fields_json)
        self._pair.decided.error = error.message
        if failed.gone or isinstance(error, WorkerLost):
            self._exclude.add(failed.incarnation)
        elif isinstance(error, HandoffError):
            # a hand-off error that one side reports was caused by the other, whose death the store may know first
            pair = self._pair
            self._avoid.add((pair.prefill if failed is pair.decode else pair.decode).incarnation)
        else:
            self._avoid.add(failed.incarnation)
        logger.warning("request %s epoch %d failed, to be replayed: %s", self.request.request_id, self._epoch, error.message)
        self._enter(RequestState.QUEUED)

    async def _place_again(self, error: HalfmoonError) -> None:
        """On another pair, once there is one. error: of the attempt before. Raises NoWorker where the request fits none of the living."""
        while True:
            try:
                self._pair = self._context.dispatcher.place_again(
                    self.request, self._sent, self._pair, self.decision, frozenset(self._exclude), frozenset(self._avoid)
                )
                break
            except NoWorker as none_left:
                self._waits_because = f"{error.message}; nothing to replay it on: {none_left.message}"
            except PromptTooLong as none_left:
                raise NoWorker(f"{error.message}; nothing to replay it on: {none_left.message}", **error.fields) from error
            logger.warning("request %s waits for a member to come: %s", self.request.request_id, self._waits_because)
            alive = await self._context.comings.wait(self._exclude)
            if alive:
                self._exclude.remove(alive)
                self._avoid.add(alive)
        self._waits_because = ""
        self._context.metrics.replayed(error.code)

    def _count_break(self, error: HalfmoonError) -> None:
        """Whoever was merely on the worker is not counted. Raises RequestQuarantined."""
        if isinstance(error, SequenceFailed) or error.fields.get("in_step"):
            self._num_breaks += 1
        if self._num_breaks >= MAX_BREAKS:
            raise RequestQuarantined(
                f"{self._num_breaks} workers broke while they computed {self.request.request_id}, and it is not given to another; "
                f"the last: {error.message}"
            )

    def _reached_end(self) -> common_pb2.FinishReason | None:
        """The finish reason if the sequence already has all its tokens and only its Finished was lost. One more token would be wrong."""
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
        # a request that decode has admitted by now stays admitted
        if error := self._context.dispatcher.judge_again(self._pair):
            self._end(RequestState.REJECTED, error)
            self._task.cancel()

    def on_admitted(self, state: common_pb2.HandoffState) -> None:
        if self._pair.is_local:
            self.clock.prefilled()
        elif self.state is RequestState.PREFILL:  # decode's admission may arrive before prefill's reply
            self.clock.prefilled()
            self._enter(RequestState.HANDOFF)
        if self.state in (RequestState.PREFILL, RequestState.HANDOFF):
            self.clock.admitted(state)
            if state.phases.transport == "grpc" and self._pair.handoff_link == "node":
                self._context.metrics.fell_back("transport")
            self._context.learner.prefilled(state, self._pair.num_loads)
            self._enter(RequestState.DECODE)

    def on_prompt_logprobs(self, logprobs: common_pb2.PromptLogprobs) -> None:
        self.prompt_logprobs.append(logprobs)

    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        if self._stopping:
            return
        if self.is_waiting:
            self._first_tokens()
        self._sent += token_ids
        self.decision.num_output_tokens = len(self._sent)
        self._pair.decode_assignment.grow(len(token_ids))
        self.events.append(Tokens(token_ids, outputs))
        self.on_news()

    def _first_tokens(self) -> None:
        self.is_waiting = False
        self._context.on_first_token(self)
        self.clock.first_came()
        self._context.learner.first_token(self.clock.record, self._pair.placement)
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
        self._context.dispatcher.finished(self._pair, len(self._sent))
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
        self._pair.release()  # there may be no attempt yet
        self._enter(state)
        if error is not None:
            self._settled = True
            left = state is RequestState.ABORTED
            verdict = self.clock.left() if left else self.clock.failed(error, rejected=state is RequestState.REJECTED)
            self._context.metrics.ended(state, error.code, verdict)
            self._traced(len(self._sent), self.clock.num_cached_tokens or 0, "", error.code)
        self.decision.num_output_tokens = len(self._sent)
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
