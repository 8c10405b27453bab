"""The prefill half's gRPC face."""

from __future__ import annotations

from typing import Protocol

import grpc.aio

from ..protocol.grpc_errors import unary_boundary
from ..protocol.log_context import logged
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import common_pb2, worker_pb2, worker_pb2_grpc


class Prefiller(Protocol):
    """The prefill half, as its face sees it."""

    async def prefill(self, request: worker_pb2.PrefillRequest) -> common_pb2.HandoffState: ...


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker: Prefiller) -> None:
        self._worker = worker

    @unary_boundary
    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        with logged(request.sequence.request_id, TraceContext.from_metadata(context.invocation_metadata())):
            return worker_pb2.PrefillReply(state=await self._worker.prefill(request))
