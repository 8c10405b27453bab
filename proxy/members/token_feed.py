"""The token feed of one decode worker: a single stream that brings the tokens of each step for all calls of this proxy.

enter(sink) ─► feed id, call number ─► DecodeRequest        StepTokens ─► sink.on_tokens, by call number
leave(call)    its later tokens are dropped                 the stream's end ─► every sink.on_feed_lost

The first call opens the feed. A feed that has ended stays ended: its calls fail, and the next call opens a new feed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grpc.aio

from ...protocol.errors import HalfmoonError, WorkerLost
from ...protocol.tasks import Tasks
from ...protocol.v1 import common_pb2, worker_pb2

logger = logging.getLogger(__name__)


class TokenSink(Protocol):
    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        """outputs: one for each token if the call asked for logprobs, else none."""
        ...

    def on_feed_lost(self, error: HalfmoonError) -> None: ...


class FeedCall(NamedTuple):
    feed_id: str
    number: int


class _OpenFeed:
    """One Tokens stream, from its opening to its end."""

    def __init__(self, stub: Any, title: str, worker_id: str) -> None:
        self.id = uuid.uuid4().hex
        self.sinks: dict[int, TokenSink] = {}
        self.error: HalfmoonError | None = None  # set once it has ended
        self.opened = asyncio.Event()  # or ended
        self._title = title
        self._worker_id = worker_id
        self._call = stub.Tokens(worker_pb2.TokensRequest(feed_id=self.id))
        self._tasks = Tasks(title)
        self._task = self._tasks.start(self._read())
        self._task.add_done_callback(self._ended)

    def close(self) -> None:
        self._task.cancel()
        self._call.cancel()

    async def _read(self) -> None:
        async for step in self._call:
            self.opened.set()
            self._deliver(step)

    def _deliver(self, step: worker_pb2.StepTokens) -> None:
        sinks, calls = self.sinks, list(step.calls)
        if len(set(calls)) == len(calls):  # mostly: one step's
            found = zip(calls, [[token_id] for token_id in step.token_ids], strict=True)
        else:
            found = _by_call(calls, step.token_ids).items()
        for call, token_ids in found:
            sink = sinks.get(call)
            if sink is not None:
                sink.on_tokens(token_ids, [])
        if step.outputs:
            self._deliver_outputs(step)

    def _deliver_outputs(self, step: worker_pb2.StepTokens) -> None:
        found: dict[int, list[common_pb2.TokenOutput]] = {}
        for output in step.outputs:
            found.setdefault(output.call, []).append(output.token)
        for call, outputs in found.items():
            sink = self.sinks.get(call)
            if sink is not None:
                sink.on_tokens([token.token_id for token in outputs], outputs)

    def _ended(self, task: asyncio.Task[None]) -> None:
        bug = None if task.cancelled() else task.exception()
        details = "the worker ended it"
        if isinstance(bug, grpc.aio.AioRpcError):
            details = bug.details() or bug.code().name
        elif bug is not None:
            logger.error("the token feed of %s broke off", self._title, exc_info=bug)
            details = f"{type(bug).__name__}: {bug}"
        self.error = WorkerLost(f"{self._title} is gone: its token feed has ended: {details}", worker=self._worker_id)
        self.opened.set()
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.on_feed_lost(self.error)


def _by_call(calls: Sequence[int], token_ids: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for call, token_id in zip(calls, token_ids, strict=True):
        found.setdefault(call, []).append(token_id)
    return found


class TokenFeed:
    """Belongs to the event loop of its worker's channel. stub: of the DecodeWorker service."""

    def __init__(self, stub: Any, title: str, worker_id: str) -> None:
        self._stub = stub
        self._title = title
        self._worker_id = worker_id
        self._numbers = itertools.count(1)  # never used twice, on any feed
        self._feed: _OpenFeed | None = None

    async def enter(self, sink: TokenSink) -> FeedCall:
        """From now on the sink gets the call's tokens, until leave(). Raises WorkerLost if no feed can be opened."""
        feed = self._feed
        if feed is None or feed.error is not None:
            feed = self._feed = _OpenFeed(self._stub, self._title, self._worker_id)
        await feed.opened.wait()
        if feed.error is not None:
            raise feed.error
        number = next(self._numbers)
        feed.sinks[number] = sink
        return FeedCall(feed.id, number)

    def leave(self, call: FeedCall) -> None:
        """Idempotent."""
        if self._feed is not None and self._feed.id == call.feed_id:
            self._feed.sinks.pop(call.number, None)

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()
