"""One Prefill call as the worker holds it: the sequence, its hand-off, and when what happened.

arrived ─queue─► first chunk ─prefill─► sampled ─push─► sealed        (the queue's time does not include loading the prefix)
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ..engine.executor import PromptLogprobs, TokenSample
from ..engine.prefix_loader import CachedPrefix
from ..engine.sequence import Sequence
from ..kvstore.client import BlockWriter, StoreClient
from ..protocol.errors import DeadlineExceeded, HalfmoonError
from ..protocol.v1 import common_pb2, worker_pb2


@dataclass(slots=True, eq=False)
class PrefillJob:
    request: worker_pb2.PrefillRequest
    sequence: Sequence
    block_keys: list[bytes]  # of the prompt's full blocks
    task: asyncio.Task[None]  # the call's own
    started: asyncio.Future[None]  # the scheduler gave it pages
    computed: asyncio.Future[None]  # its first token is there
    pushed: asyncio.Future[None]  # the last slice was handed to the writer
    error: HalfmoonError | None = None  # why it failed, if the call itself did not raise it
    closed: bool = False  # nobody reads its pages or writes to its hand-off any more
    client: StoreClient | None = None
    writer: BlockWriter | None = None
    sample: TokenSample | None = None
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])  # in order, a step each
    prefix: CachedPrefix = field(default_factory=CachedPrefix)
    arrived: float = field(default_factory=time.monotonic)
    first_chunk: float = 0.0
    sampled: float = 0.0
    compute_s: float = 0.0  # its share of its steps' seconds, by tokens

    def fail(self, error: HalfmoonError) -> None:
        """Ends the call with error, wherever it waits. On the event loop."""
        if not self.closed and self.error is None:
            self.error = error
            self.task.cancel()

    def push_failed(self, error: HalfmoonError) -> None:
        """Any thread."""
        self.task.get_loop().call_soon_threadsafe(self.fail, error)

    def set_computed(self) -> None:
        """On the event loop."""
        if not self.computed.done():
            self.computed.set_result(None)

    def tell_pushed(self) -> None:
        """Any thread."""
        self.task.get_loop().call_soon_threadsafe(self._set_pushed)

    def _set_pushed(self) -> None:
        if not self.pushed.done():
            self.pushed.set_result(None)

    def time_out(self) -> None:
        if not self.started.done():
            where = "in the prefill worker's queue"
        elif self.writer is None:
            where = "waiting for room in the KV store"
        elif self.sample is None:
            where = "in prefill"
        else:
            where = "while its KV was pushed"
        waited_s = time.monotonic() - self.arrived
        self.fail(DeadlineExceeded(f"request {self.sequence.request_id} ran out of time {where}, {waited_s:.3f} s after it came"))

    def state(self) -> common_pb2.HandoffState:
        """As of now: push_s is the time since the first token was sampled."""
        assert self.sample is not None and self.writer is not None and self.client is not None
        phases = common_pb2.PrefillPhases(
            queue_s=self.first_chunk - self.arrived - self.prefix.load_s,
            prefix_load_s=self.prefix.load_s,
            prefill_s=self.sampled - self.first_chunk,
            push_s=time.monotonic() - self.sampled,
            num_bytes_pushed=self.writer.num_bytes,
            num_bytes_loaded=self.prefix.num_bytes,
            transport=self.client.transport,
            compute_s=self.compute_s,
            load_transport=self.prefix.transport,
            ssd_wait_s=self.prefix.ssd_wait_s,
            num_bytes_ssd=self.prefix.num_bytes_ssd,
            ssd_store=self.prefix.ssd_store,
        )
        return common_pb2.HandoffState(
            num_tokens=self.sequence.num_tokens,
            num_cached_tokens=self.prefix.num_tokens,
            first_token=self.sample.to_proto(),
            phases=phases,
        )
