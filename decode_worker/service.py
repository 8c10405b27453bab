"""The decode half's gRPC face."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio

from ..protocol.grpc_errors import stream_boundary, unary_boundary
from ..protocol.log_context import logged
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import worker_pb2, worker_pb2_grpc
from .job import DecodeJob
from .token_feed import TokenFeeds


class Decoder(Protocol):
    """The decode half, as its face sees it."""

    feeds: TokenFeeds

    def open(self, request: worker_pb2.DecodeRequest) -> DecodeJob: ...

    def close(self, job: DecodeJob) -> None: ...

    def stop_sequence(self, request_id: str) -> bool: ...


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, worker: Decoder) -> None:
        self._worker = worker

    @stream_boundary
    async def Decode(self, request: worker_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[worker_pb2.DecodeReply]:
        with logged(request.sequence.request_id, TraceContext.from_metadata(context.invocation_metadata())):
            job = self._worker.open(request)  # the tasks that it begins keep it
        call: Any = context  # the stubs ask for a class that grpc does not have
        # a generator that waits in `yield` does not learn that the call has ended; this callback does
        call.add_done_callback(lambda _: self._worker.close(job))
        try:
            async for reply in job.replies():
                yield reply
        finally:
            self._worker.close(job)

    # a coroutine that writes, not a generator: the feed is closed at the end of the stream, not when the collector gets to it
    @unary_boundary
    async def Tokens(self, request: worker_pb2.TokensRequest, context: grpc.aio.ServicerContext) -> None:
        feed = self._worker.feeds.open(request.feed_id)
        try:
            await context.write(worker_pb2.StepTokens())
            while (step := await feed.next_step()) is not None:
                await context.write(step)
        finally:
            self._worker.feeds.close(feed)

    @unary_boundary
    async def Stop(self, request: worker_pb2.StopRequest, context: grpc.aio.ServicerContext) -> worker_pb2.StopReply:
        return worker_pb2.StopReply(found=self._worker.stop_sequence(request.request_id))
