"""The prefill worker's gRPC face."""

from __future__ import annotations

from typing import Protocol

import grpc.aio

from ..protocol.address import join_address
from ..protocol.channel import create_server
from ..protocol.grpc_errors import unary_boundary
from ..protocol.v1 import common_pb2, worker_pb2, worker_pb2_grpc


class Prefiller(Protocol):
    """The worker, as its face sees it."""

    async def prefill(self, request: worker_pb2.PrefillRequest) -> common_pb2.HandoffState: ...


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker: Prefiller) -> None:
        self._worker = worker

    @unary_boundary
    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        return worker_pb2.PrefillReply(state=await self._worker.prefill(request))


async def start_server(worker: Prefiller, host: str) -> tuple[grpc.aio.Server, str]:
    """A running server on a free port of host, and its "host:port"."""
    server, port = create_server(host, 0)
    worker_pb2_grpc.add_PrefillWorkerServicer_to_server(PrefillService(worker), server)
    await server.start()
    return server, join_address(host, port)
