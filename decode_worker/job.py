"""One Decode call as the worker holds it: the sequence, its hand-off, what has not been sent to the client yet, and when what happened.

arrived ─hand-off wait─► sealed ─queue, for pages─► started ─intake─► admitted ─► second token ─► … ─► last token
                                └── it may start before the seal, and the intake overlap it ───┘
Local prefill has no hand-off: arrived ─queue─► started ─prefix load─► queue ─► first chunk ─prefill─► admitted, with its first token
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ..engine.executor import PromptLogprobs
from ..engine.prefix_loader import CachedPrefix
from ..engine.sequence import Sequence
from ..kvstore.client import BlockReader, StoreClient
from ..protocol.errors import DeadlineExceeded, HalfmoonError
from ..protocol.v1 import common_pb2, worker_pb2
from .token_feed import TokenFeed


@dataclass(slots=True, eq=False)
class DecodeJob:
    request: worker_pb2.DecodeRequest
    sequence: Sequence
    block_keys: list[bytes]  # of the full blocks that the hand-off brings
    started: asyncio.Future[None]  # the scheduler gave it pages
    feed: TokenFeed | None = None  # takes the tokens after the first, if the proxy has opened one
    intake: asyncio.Task[None] | None = None  # fetches the hand-off into pages, or loads a local prefill's prefix
    client: StoreClient | None = None  # of the hand-off's store
    reader: BlockReader | None = None
    caching_prompt: asyncio.Task[None] | None = None  # of a local prefill: caches the prompt's blocks during the answer
    aborted: bool = False  # the store knows that nobody will take the hand-off
    timer: asyncio.TimerHandle | None = None  # of the deadline
    state: common_pb2.HandoffState | None = None  # set on admission
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)  # of a local prefill, not sent yet
    unsent: list[common_pb2.TokenOutput] = field(default_factory=list)
    finish_reason: common_pb2.FinishReason | None = None
    error: HalfmoonError | None = None
    may_finish: bool = False  # its blocks are cached, or that takes too long: Finished may be sent
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # there is something to send
    num_given_tokens: int = 0  # the first included
    num_preemptions: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    sealed_at: float = 0.0
    started_at: float = 0.0
    admitted_at: float = 0.0
    second_token_at: float = 0.0
    last_token_at: float = 0.0
    # local prefill's
    prefix: CachedPrefix = field(default_factory=CachedPrefix)
    first_chunk_at: float = 0.0
    compute_s: float = 0.0  # its share of its steps' seconds, by tokens

    @property
    def is_local(self) -> bool:
        """The prompt is computed here, without a hand-off."""
        return self.request.local_prefill

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def admit(self, state: common_pb2.HandoffState) -> None:
        """The first token counts as sent now."""
        self.state = state
        self.admitted_at = self.last_token_at = time.monotonic()
        self.sequence.pace(self.admitted_at)
        self.num_given_tokens = 1
        if self.feed is None:
            self.unsent.append(state.first_token)
        self.changed.set()

    def push(self, token: common_pb2.TokenOutput) -> None:
        """A token after the first one."""
        self.last_token_at = time.monotonic()
        self.second_token_at = self.second_token_at or self.last_token_at
        self.num_given_tokens += 1
        if self.feed is not None:
            self.feed.add(self.request.call, token)
        else:
            self.unsent.append(token)
            self.changed.set()

    def let_finish(self) -> None:
        """Idempotent."""
        self.may_finish = True
        self.changed.set()

    def leave_feed(self) -> None:
        """The job stops sending to its feed. Idempotent."""
        feed, self.feed = self.feed, None
        if feed is not None:
            feed.leave()

    async def replies(self) -> AsyncIterator[worker_pb2.DecodeReply]:
        """The replies until the job ends. Raises the error that ended it. Tokens that came meanwhile go in one message."""
        told_admission = False
        while True:
            await self.changed.wait()
            self.changed.clear()
            while self.prompt_logprobs:
                for part in self.prompt_logprobs.pop(0).to_protos():
                    yield worker_pb2.DecodeReply(prompt_logprobs=part)
            if self.state is not None and not told_admission:
                told_admission = True
                admitted = worker_pb2.DecodeReply.Admitted(state=self.state, handoff_wait_s=self.phases().handoff_wait_s)
                yield worker_pb2.DecodeReply(admitted=admitted)
            if self.unsent:
                tokens, self.unsent = self.unsent, []
                yield worker_pb2.DecodeReply(tokens=worker_pb2.DecodeReply.Tokens(tokens=tokens))
            if self.unsent:  # more came while that was written
                self.changed.set()
            elif self.error is not None:
                raise self.error
            elif self.finish_reason is not None and self.may_finish:
                finished = worker_pb2.DecodeReply.Finished(
                    reason=self.finish_reason, phases=self.phases(), num_tokens=self.num_given_tokens
                )
                yield worker_pb2.DecodeReply(finished=finished)
                return

    def phases(self) -> common_pb2.DecodePhases:
        """For a local prefill, what came before the admission is in its PrefillPhases."""
        if self.state is None:  # ended before its hand-off was there
            waited_s = 0.0 if self.is_local else time.monotonic() - self.arrived_at
            return common_pb2.DecodePhases(handoff_wait_s=waited_s, num_preemptions=self.num_preemptions)
        phases = common_pb2.DecodePhases(
            first_decode_s=max(self.second_token_at - self.admitted_at, 0.0),
            decode_s=max(self.last_token_at - self.admitted_at, 0.0),
            num_preemptions=self.num_preemptions,
        )
        if not self.is_local:
            loaded_from = max(self.sealed_at, self.started_at)
            phases.handoff_wait_s = self.sealed_at - self.arrived_at
            phases.intake_s = self.admitted_at - loaded_from
            phases.queue_s = loaded_from - self.sealed_at
        return phases

    def timeout_error(self) -> DeadlineExceeded:
        if self.state is not None:
            where = f"in decode, with {self.sequence.num_output_tokens} tokens of its answer"
        elif self.is_local and self.started.done():
            where = "in prefill on the decode worker"
        elif self.is_local or self.sealed_at:
            where = "waiting for the decode worker's pages"
        else:
            where = "waiting for its hand-off"
        waited_s = time.monotonic() - self.arrived_at
        return DeadlineExceeded(f"request {self.sequence.request_id} ran out of time {where}, {waited_s:.3f} s after it came")
