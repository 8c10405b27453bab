"""One Prefill call as the worker holds it: the sequence, its hand-off, and what happened when.

arrived ─queue─► first chunk ─prefill─► sampled ─push─► sealed        (loading the prefix is taken out of the queue's time)
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from ..engine.sampler import TokenSample
from ..engine.sequence import Sequence
from ..kvstore.client import BlockWriter, StoreClient
from ..protocol.errors import DeadlineExceeded, HalfmoonError, PromptTooLong
from ..protocol.v1 import common_pb2, worker_pb2


@dataclass(slots=True, eq=False)
class PrefillJob:
    request: worker_pb2.PrefillRequest
    sequence: Sequence
    block_keys: list[bytes]  # of the prompt's full blocks
    task: asyncio.Task[None]  # the call's own
    started: asyncio.Future[None]  # the scheduler gave it pages
    pushed: asyncio.Future[None]  # the last slice was handed to the writer
    error: HalfmoonError | None = None  # why it failed, where that did not come out of the call itself
    closed: bool = False  # nobody reads its pages or writes to its hand-off any more
    client: StoreClient | None = None
    writer: BlockWriter | None = None
    sample: TokenSample | None = None
    num_cached_tokens: int = 0
    corrupt_in: StoreClient | None = None  # the store whose cached blocks did not match their checksums
    corrupt_blocks: list[int] = field(default_factory=list)
    num_bytes_loaded: int = 0
    load_transport: str = ""
    arrived: float = field(default_factory=time.monotonic)
    prefix_load_s: float = 0.0
    first_chunk: float = 0.0
    sampled: float = 0.0
    compute_s: float = 0.0  # of its steps' seconds, by its share of their tokens

    def fail(self, error: HalfmoonError) -> None:
        """Ends the call with error, wherever it waits. On the event loop."""
        if not self.closed and self.error is None:
            self.error = error
            self.task.cancel()

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
            queue_s=self.first_chunk - self.arrived - self.prefix_load_s,
            prefix_load_s=self.prefix_load_s,
            prefill_s=self.sampled - self.first_chunk,
            push_s=time.monotonic() - self.sampled,
            num_bytes_pushed=self.writer.num_bytes,
            num_bytes_loaded=self.num_bytes_loaded,
            transport=self.client.transport,
            compute_s=self.compute_s,
            load_transport=self.load_transport,
        )
        return common_pb2.HandoffState(
            num_tokens=self.sequence.num_tokens,
            num_cached_tokens=self.num_cached_tokens,
            first_token=self.sample.to_proto(),
            phases=phases,
        )


def check_sequence(sequence: Sequence, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest for tokens that the model does not have, PromptTooLong."""
    sequence.check_tokens(vocab_size)
    if sequence.num_tokens >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {sequence.num_tokens} tokens; with at least one of the answer the model takes {max_model_len}",
            num_tokens=sequence.num_tokens,
            limit=max_model_len - 1,
        )
