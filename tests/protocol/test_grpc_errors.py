from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from halfmoon.protocol.grpc_errors import error_from_proto, error_to_proto, from_rpc_error, stream_boundary, unary_boundary
from halfmoon.protocol.v1 import inference_pb2, inference_pb2_grpc


class Refusing(inference_pb2_grpc.InferenceServicer):
    @unary_boundary
    async def Models(self, request: inference_pb2.ModelsRequest, context: grpc.aio.ServicerContext) -> inference_pb2.ModelsReply:
        raise Overloaded("queue of 3 is full; come back", retry_after_s=4.0, limit=3)

    @unary_boundary
    async def Cancel(self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext) -> inference_pb2.CancelReply:
        raise KeyError("a bug")

    @stream_boundary
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateReply]:
        yield inference_pb2.GenerateReply()
        raise Overloaded("later", retry_after_s=1.0)


@pytest.fixture
async def stub() -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    server, port = create_server("127.0.0.1", 0)
    inference_pb2_grpc.add_InferenceServicer_to_server(Refusing(), server)
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await server.stop(0)


async def test_an_error_of_the_tree_crosses_with_its_type_and_fields(stub: inference_pb2_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Models(inference_pb2.ModelsRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = from_rpc_error(caught.value, "proxy")
    assert isinstance(error, Overloaded)
    assert (error.message, error.retry_after_s, error.fields["limit"]) == ("queue of 3 is full; come back", 4.0, 3)


async def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_sent(stub: inference_pb2_grpc.InferenceStub) -> None:
    call = stub.Generate(inference_pb2.GenerateRequest())
    assert await call.read() == inference_pb2.GenerateReply()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(from_rpc_error(caught.value, "proxy"), Overloaded)


async def test_a_bug_becomes_an_internal_error_that_names_it(stub: inference_pb2_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(inference_pb2.CancelRequest())
    error = from_rpc_error(caught.value, "proxy")
    assert isinstance(error, InternalError)
    assert "KeyError" in error.message


async def test_a_peer_that_does_not_answer_is_unavailable_and_named() -> None:
    server, port = create_server("127.0.0.1", 0)
    await server.start()
    await server.stop(0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).Models(inference_pb2.ModelsRequest())
    error = from_rpc_error(caught.value, "decode worker decode-0")
    assert isinstance(error, Unavailable)
    assert "decode-0" in error.message


def test_an_error_inside_a_message_comes_back_equal() -> None:
    error = Overloaded("full", retry_after_s=2.0)
    copy = error_from_proto(error_to_proto(error))
    assert isinstance(copy, Overloaded)
    assert (copy.message, copy.fields) == (error.message, error.fields)


async def test_a_taken_port_is_refused_in_words() -> None:
    server, port = create_server("127.0.0.1", 0)
    await server.start()
    with pytest.raises((OSError, RuntimeError), match=str(port)):
        create_server("127.0.0.1", port)
    await server.stop(0)


async def test_a_message_over_the_servers_limit_is_an_invalid_request_with_both_sizes() -> None:
    server, port = create_server("127.0.0.1", 0, max_request_bytes=1000)
    inference_pb2_grpc.add_InferenceServicer_to_server(Refusing(), server)
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(inference_pb2.GenerateRequest(prompt="x" * 5000)).read()
        error = from_rpc_error(caught.value, "the proxy")
        assert isinstance(error, InvalidRequest) and "has 5003 bytes; the proxy takes 1000" in error.message
        assert await stub.Generate(inference_pb2.GenerateRequest(prompt="x" * 900)).read() == inference_pb2.GenerateReply()
    await server.stop(0)


async def test_a_call_that_ended_while_a_message_was_being_sent_is_a_stream_that_the_peer_ended() -> None:
    nothing = grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core")
    error = from_rpc_error(lost, "the proxy")
    assert (type(error), error.message) == (Unavailable, "the proxy ended the stream")
    other = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details="of another kind")
    assert isinstance(from_rpc_error(other, "the proxy"), InternalError)
