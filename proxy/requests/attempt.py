"""One attempt at a request: a pair of workers, under one epoch of the hand-off.

        ┌─► Decode on d ─► Admitted, first token ─► Finished, number of tokens ─┐
start ──┤   d's token feed ─► the other tokens ─────────────────────────────────┼─► outcome: Finished, with all its tokens | LegFailed
        └─► Prefill on p ─► state                                               │
   p, d or the hand-off's store leaves the cluster, a call or the feed fails ────┘
The two streams of d are not ordered. Tokens that the feed brings before Admitted wait for it, and Finished waits for the last token.
A sequence whose prompt's log probabilities are asked for gets them from who computes it, before all tokens: Admitted waits for them.
A local pair has only the Decode leg and no hand-off: d computes the prompt, and neither p nor the store takes part.
close: both calls cancelled, the store told why, what was assigned undone
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from ...protocol.errors import (
    Draining,
    HalfmoonError,
    HandoffAborted,
    InternalError,
    InvalidRequest,
    StoreUnavailable,
    WorkerLost,
    build_error,
)
from ...protocol.grpc_errors import TRAILER, error_to_proto, from_rpc_error
from ...protocol.tasks import Tasks
from ...protocol.trace_context import TraceContext
from ...protocol.v1 import common_pb2, kvstore_pb2, worker_pb2
from ..conductor.placement import Placement
from ..members.member import Member
from ..members.token_feed import FeedCall
from .pair import Pair
from .prompt import to_wire

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0  # of Stop and Abort
DEADLINE_SLACK_S = 1.0  # the runner's own timer comes first and knows the request's state; gRPC's deadline is the fallback


class LegFailed(Exception):
    def __init__(self, member: Member, error: HalfmoonError) -> None:
        super().__init__(member.title, error)
        self.member = member
        self.error = error


class AttemptListener(Protocol):
    def on_prefilled(self, state: common_pb2.HandoffState) -> None: ...

    def on_admitted(self, state: common_pb2.HandoffState) -> None: ...

    def on_prompt_logprobs(self, logprobs: common_pb2.PromptLogprobs) -> None:
        """Several times, in the prompt's order, before on_admitted."""
        ...

    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        """outputs: one for each token where logprobs were asked for, else none."""
        ...


class Attempt:
    """
    Args:
        sequence: without the token ids and block keys, which come from the pair's prompt.
        tasks: owns what the attempt runs. Stop and Abort may outlive the attempt.
    """

    def __init__(
        self,
        pair: Pair,
        sequence: common_pb2.SequenceSpec,
        handoff: common_pb2.HandoffId,
        listener: AttemptListener,
        tasks: Tasks,
        trace: TraceContext | None = None,
    ) -> None:
        self.pair = pair
        self.prefilled = False
        self.admitted = False
        self.closed = False
        self.outcome: asyncio.Future[worker_pb2.DecodeReply.Finished] = asyncio.get_running_loop().create_future()
        self._sequence = sequence
        self._handoff = handoff
        self._listener = listener
        self._metadata = None if trace is None else trace.metadata
        self._feed_call: FeedCall | None = None
        self._unscored = sequence.sampling.HasField("num_prompt_logprobs") and not pair.is_local  # its prefill leg gives them
        self._held: common_pb2.HandoffState | None = None  # Admitted, that came before them
        self._num_tokens = 0  # that the call has given
        self._early: list[tuple[list[int], list[common_pb2.TokenOutput]]] = []  # came before Admitted
        self._end: worker_pb2.DecodeReply.Finished | None = None
        self._background = tasks
        self._calls: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unwatch: list[Callable[[], None]] = []

    def start(self) -> None:
        """Opens the calls, decode first: decode waits for the hand-off, and the hand-off does not wait for decode."""
        pair = self.pair
        for member in pair.members:
            self._unwatch.append(member.on_gone(self._member_gone))
            if member.gone:  # it left after the placement
                self._member_gone(member)
        if self.outcome.done():
            return
        self._tasks.append(self._background.spawn(self._follow_decode(), self._title("its decode leg"), self._leg_broke))
        if not pair.is_local:
            self._tasks.append(self._background.spawn(self._follow_prefill(), self._title("its prefill leg"), self._leg_broke))

    def stop(self, on_unheard: Callable[[], None]) -> None:
        """Asks decode to end the sequence as finished. on_unheard runs if decode does not know the sequence or cannot be reached."""
        self._background.spawn(self._stop(on_unheard), self._title("Stop"), lambda _: on_unheard())

    def close(self, reason: HalfmoonError) -> None:
        """Takes effect at once; further calls do nothing. An unfinished attempt is aborted everywhere, with the reason."""
        if self.closed:
            return
        self.closed = True
        self.pair.release()
        for unwatch in self._unwatch:
            unwatch()
        if self._feed_call is not None:
            self.pair.decode.token_feed.leave(self._feed_call)
        if self._finished:
            return  # the calls are at their own end
        for task in self._tasks:
            task.cancel()
        for call in self._calls:
            call.cancel()
        self.outcome.cancel()
        store = self.pair.store
        if store is not None and not (self.admitted or store.gone):
            # if this fails, the hand-off's lease still ends by itself
            self._background.spawn(self._abort_handoff(store, reason), self._title("Abort"))

    @property
    def _finished(self) -> bool:
        return self.outcome.done() and not self.outcome.cancelled() and self.outcome.exception() is None

    @property
    def _timeout_s(self) -> float:
        return self._sequence.deadline_s + DEADLINE_SLACK_S

    @property
    def _store_address(self) -> str:
        return self.pair.store.address if self.pair.store is not None else ""

    def _prefill_request(self) -> bytes:
        placement = self.pair.placement
        prefix = placement.prefix
        request = worker_pb2.PrefillRequest(
            sequence=self._sequence,
            handoff=self._handoff,
            store_address=self._store_address,
            prefix=worker_pb2.PrefixHint(**prefix._asdict(), ssd=_ssd_use(placement, prefix.store_address)) if prefix else None,
            skip_own_store=not placement.prefill.store_address,
            own_ssd=_ssd_use(placement, placement.prefill.store_address),
        )
        return to_wire(request, self.pair.prompt)

    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        """From the token feed."""
        if not self.admitted:
            self._early.append((token_ids, outputs))
            return
        self._num_tokens += len(token_ids)
        self._listener.on_tokens(token_ids, outputs)
        if self._end is not None:
            self._settle(self._end)

    def on_feed_lost(self, error: HalfmoonError) -> None:
        self._fail(self.pair.decode, error)

    async def _follow_decode(self) -> None:
        member = self.pair.decode
        try:
            feed_call = self._feed_call = await member.token_feed.enter(self)
            request = worker_pb2.DecodeRequest(
                sequence=self._sequence,
                handoff=self._handoff,
                local_prefill=self.pair.is_local,
                feed_id=feed_call.feed_id,
                call=feed_call.number,
                store_address=self._store_address,
                skip_own_store=not self.pair.placement.decode.store_address,
                own_ssd=_ssd_use(self.pair.placement, self.pair.placement.decode.store_address),
            )
            call = member.start_decode(to_wire(request, self.pair.prompt), timeout=self._timeout_s, metadata=self._metadata)
            self._calls.append(call)
            async for reply in call:
                if self.closed:
                    return
                if reply.HasField("prompt_logprobs"):
                    self._listener.on_prompt_logprobs(reply.prompt_logprobs)
                elif reply.HasField("admitted"):
                    self._admit(reply.admitted.state)
                elif reply.HasField("finished"):
                    self._end = reply.finished
                    self._settle(reply.finished)
            if self._end is None:
                self._fail(member, InternalError(f"{member.title} ended the stream of {self._sequence.request_id} without Finished"))
        except HalfmoonError as error:
            self._fail(member, error)
        except grpc.aio.AioRpcError as error:
            self._fail(member, _leg_error(error, member))
        except asyncio.CancelledError:
            self._interrupted(member)

    def _admit(self, state: common_pb2.HandoffState) -> None:
        if self._unscored:
            self._held = state
            return
        self.admitted = True
        self.pair.begin_decode()
        self._listener.on_admitted(state)
        first = state.first_token
        self.on_tokens([first.token_id], [first] if first.HasField("logprob") else [])
        early, self._early = self._early, []
        for token_ids, outputs in early:
            self.on_tokens(token_ids, outputs)

    def _settle(self, end: worker_pb2.DecodeReply.Finished) -> None:
        if self._num_tokens >= end.num_tokens and not self.outcome.done():
            self.outcome.set_result(end)

    async def _follow_prefill(self) -> None:
        member = self.pair.prefill
        try:
            state = await (self._prefill_with_logprobs(member) if self._unscored else self._prefill(member))
            self.prefilled = True
            self.pair.end_prefill()
            if self.closed:
                return
            self._listener.on_prefilled(state)
            self._unscored = False
            if self._held is not None and not self.closed:
                self._admit(self._held)
        except HalfmoonError as error:
            self._fail(member, error)
        except grpc.aio.AioRpcError as error:
            self._fail(member, _leg_error(error, member))
        except asyncio.CancelledError:
            self._interrupted(member)

    async def _prefill(self, member: Member) -> common_pb2.HandoffState:
        call = member.start_prefill(self._prefill_request(), timeout=self._timeout_s, metadata=self._metadata)
        self._calls.append(call)
        return (await call).state

    async def _prefill_with_logprobs(self, member: Member) -> common_pb2.HandoffState:
        call = member.start_prefill_with_logprobs(self._prefill_request(), timeout=self._timeout_s, metadata=self._metadata)
        self._calls.append(call)
        state: common_pb2.HandoffState | None = None
        async for reply in call:
            if reply.HasField("state"):
                state = reply.state
            elif not self.closed:
                self._listener.on_prompt_logprobs(reply.prompt_logprobs)
        if state is None:
            raise InternalError(f"{member.title} ended the prefill of {self._sequence.request_id} without its state")
        return state

    def _leg_broke(self, bug: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(bug)  # nothing else would end the request

    def _title(self, what: str) -> str:
        return f"request {self._sequence.request_id}: {what}"

    def _interrupted(self, member: Member) -> None:
        # close() cancels the task first, so here the channel was closed under the call
        self._fail(member, WorkerLost(f"{member.title} is gone: its channel was closed", worker=member.id))

    def _member_gone(self, member: Member) -> None:
        if member is self.pair.store:
            self._fail(member, StoreUnavailable(f"{member.title} left the cluster", store=member.id))
        else:
            self._fail(member, member.lost(self._sequence.request_id))

    def _fail(self, member: Member, error: HalfmoonError) -> None:
        # once decode has admitted the hand-off, the prefill worker and the store are no longer needed; decode always is
        pair = self.pair
        needless = (member is pair.prefill and (self.prefilled or self.admitted)) or (member is pair.store and self.admitted)
        if (member is pair.decode or not needless) and not self.outcome.done():
            error = _cause(error)
            named = error.fields.get("worker")
            culprit = next((one for one in (pair.prefill, pair.decode) if one.id == named), member)
            self.outcome.set_exception(LegFailed(culprit, error))

    async def _stop(self, on_unheard: Callable[[], None]) -> None:
        request = worker_pb2.StopRequest(request_id=self._sequence.request_id)
        try:
            if (await self.pair.decode.decode_worker.Stop(request, timeout=CALL_TIMEOUT_S)).found:
                return
        except grpc.aio.AioRpcError as error:
            logger.warning("request %s: %s did not take Stop: %s", self._sequence.request_id, self.pair.decode.title, error.details())
        except asyncio.CancelledError:
            logger.debug("request %s: %s left before it took Stop", self._sequence.request_id, self.pair.decode.title)
        on_unheard()

    async def _abort_handoff(self, store: Member, reason: HalfmoonError) -> None:
        request = kvstore_pb2.AbortRequest(handoff=self._handoff, reason=error_to_proto(reason))
        try:
            await store.store.Abort(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("%s did not take the abort of %s: %s", store.title, self._handoff.id, error.details())
        except asyncio.CancelledError:
            logger.debug("%s left before it took the abort of %s", store.title, self._handoff.id)


def _ssd_use(placement: Placement, store: str) -> common_pb2.SsdUse:
    verdict = placement.ssd_verdicts.get(store)
    if verdict is None:
        return common_pb2.SSD_USE_UNSPECIFIED
    return common_pb2.SSD_USE_LOAD if verdict.loads else common_pb2.SSD_USE_LEAVE


def _cause(error: HalfmoonError) -> HalfmoonError:
    """Why a worker gave a hand-off up, where it said so: decode may hear of it before the prefill call has ended.

    Or what is wrong with the request itself: no other pair would mend that.
    """
    if not isinstance(error, HandoffAborted) or "reason" not in error.fields:
        return error
    fields = error.fields.get("reason_fields") or {}
    cause = build_error(error.fields["reason"], error.fields["reason_message"], json.dumps(fields))
    return cause if "worker" in fields or isinstance(cause, InvalidRequest) else error


def _leg_error(error: grpc.aio.AioRpcError, member: Member) -> HalfmoonError:
    """The worker's typed error as it is. What only a dying or leaving worker causes becomes WorkerLost."""
    found = from_rpc_error(error, member.title)
    typed = any(key == TRAILER for key, _ in error.trailing_metadata() or ())
    details = error.details() or ""
    # a connection that breaks under a call usually gives UNAVAILABLE, but not always
    broken = "RST_STREAM" in details or "Stream removed" in details
    lost = broken or error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    if (lost and not typed) or isinstance(found, Draining):
        return WorkerLost(f"{member.title} is gone: {details}", worker=member.id)
    return found
