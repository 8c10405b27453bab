"""The prefill half's gRPC face."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import grpc.aio

from ..engine.executor import PromptLogprobs
from ..protocol.grpc_errors import unary_boundary
from ..protocol.log_context import logged
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import common_pb2, worker_pb2, worker_pb2_grpc


class Prefilled(NamedTuple):
    state: common_pb2.HandoffState
    prompt_logprobs: list[PromptLogprobs]  # in order; none where they were not asked for


class Prefiller(Protocol):
    """The prefill half, as its face sees it."""

    async def prefill(self, request: worker_pb2.PrefillRequest) -> Prefilled: ...


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker: Prefiller) -> None:
        self._worker = worker

    @unary_boundary
    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        with logged(request.sequence.request_id, TraceContext.from_metadata(context.invocation_metadata())):
            return worker_pb2.PrefillReply(state=(await self._worker.prefill(request)).state)

    # a coroutine that writes: it is cancelled with its call, as Prefill is
    @unary_boundary
    async def PrefillWithLogprobs(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        with logged(request.sequence.request_id, TraceContext.from_metadata(context.invocation_metadata())):
            prefilled = await self._worker.prefill(request)
            for scored in prefilled.prompt_logprobs:
                for part in scored.to_protos():
                    await context.write(worker_pb2.PrefillReply(prompt_logprobs=part))
            await context.write(worker_pb2.PrefillReply(state=prefilled.state))
