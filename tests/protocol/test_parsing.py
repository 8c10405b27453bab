"""Bytes that are no message, at every kind of method: INVALID_ARGUMENT, and nothing in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.grpc_errors import stream_boundary, unary_boundary
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

GARBAGE = b"\xff\xff\xff\x07 this is not a message"


class Inference(inference_pb2_grpc.InferenceServicer):
    @unary_boundary
    async def Models(self, request: inference_pb2.ModelsRequest, context: grpc.aio.ServicerContext) -> inference_pb2.ModelsReply:
        return inference_pb2.ModelsReply()

    @unary_boundary
    async def Cancel(self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext) -> inference_pb2.CancelReply:
        raise InvalidRequest(f"there is no request {request.request_id * 1000}")

    @stream_boundary
    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[inference_pb2.GenerateReply]:
        yield inference_pb2.GenerateReply()


class Control(control_pb2_grpc.ControlServicer):
    @unary_boundary
    async def Join(self, reports: AsyncIterator[control_pb2.MemberReport], context: grpc.aio.ServicerContext) -> None:
        async for report in reports:
            assert not report.HasField("broken")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server, port = create_server("127.0.0.1", 0)
    inference_pb2_grpc.add_InferenceServicer_to_server(Inference(), server)
    control_pb2_grpc.add_ControlServicer_to_server(Control(), server)
    healthy = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - made by its __init__
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0.0)


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("halfmoon.v1.Inference/Models", False),
        ("halfmoon.v1.Inference/Generate", False),
        ("halfmoon.v1.Control/Join", True),
        ("grpc.health.v1.Health/Check", False),
        ("grpc.health.v1.Health/Watch", False),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
    ],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument_and_not_logged(
    address: str, method: str, streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_channel(address) as channel:
        kind = channel.stream_stream if streams else channel.unary_stream
        call = kind(f"/{method}")
        with caplog.at_level(logging.INFO), pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call(sent() if streams else GARBAGE):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no message of this method" in (caught.value.details() or "")
        assert caplog.records == []


async def sent() -> AsyncIterator[bytes]:
    yield GARBAGE
    await asyncio.Event().wait()


@pytest.mark.parametrize("text", ["x" * 5, "\u20ac" * 5])
async def test_an_error_that_quotes_a_long_text_keeps_its_status(address: str, text: str) -> None:
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Cancel(inference_pb2.CancelRequest(request_id=text))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"there is no request {text[0]}" in (caught.value.details() or "")
