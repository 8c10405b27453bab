"""proxy/slow_reader.py: a gRPC client that does not read its stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from halfmoon.protocol.v1 import inference_pb2, inference_pb2_grpc
from halfmoon.proxy.slow_reader import watched


async def test_a_write_that_is_not_taken_ends_the_block() -> None:
    taken: list[int] = []

    async def write(message: int) -> None:
        if message == 3:
            await asyncio.Event().wait()
        taken.append(message)

    with pytest.raises(asyncio.CancelledError):
        async with watched(write, 0.05) as watched_write:
            for message in range(9):
                await watched_write(message)
    assert taken == [0, 1, 2]


async def test_time_between_two_writes_is_nobodys_fault() -> None:
    num_looks, loop = 0, asyncio.get_running_loop()

    async def write(message: int) -> None:
        nonlocal num_looks
        num_looks += 1

    async with watched(write, 0.01) as watched_write:
        await watched_write(0)
        await asyncio.wait_for(loop.create_task(asyncio.sleep(0.1)), 60)  # ten times the limit
        await watched_write(1)
    assert num_looks == 2


def test_a_client_that_does_not_read_loses_its_request(make_face: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    face = make_face(write_timeout_s=0.3)
    face.workers.script = lambda sequence: [5] * 400
    face.workers.gate_at = 399
    with caplog.at_level(logging.INFO), grpc.insecure_channel(face.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        tokens = inference_pb2.TokenIds(token_ids=[5] * 8)
        call = stub.Generate(inference_pb2.GenerateRequest(tokens=tokens, max_tokens=400, num_logprobs=20, n=16))
        assert next(call).HasField("admitted")
        assert face.workers.cancelled.wait(60)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
    assert face.num_under_way == 0
