"""proxy/slow_reader.py: a gRPC client that does not read its stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from halfmoon.protocol.v1 import inference_pb2, inference_pb2_grpc
from halfmoon.proxy.slow_reader import watched

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]  # megabytes are taken unread otherwise


async def test_a_write_that_is_not_taken_is_told_once_and_goes_on() -> None:
    taken: list[int] = []
    late: list[str] = []
    told, reads = asyncio.Event(), asyncio.Event()

    async def write(message: int) -> None:
        if message == 3:
            await reads.wait()
        taken.append(message)

    def on_late(reason: str) -> None:
        late.append(reason)
        told.set()

    async def write_all() -> None:
        with watched(write, 0.05, on_late) as watched_write:
            for message in range(6):
                await watched_write(message)

    writing = asyncio.create_task(write_all())
    await asyncio.wait_for(told.wait(), 60)
    assert taken == [0, 1, 2] and late == ["the client took nothing of its stream for 0.05 s"]
    reads.set()
    await writing
    assert taken == [0, 1, 2, 3, 4, 5] and len(late) == 1


async def test_time_between_two_writes_is_nobodys_fault() -> None:
    late: list[str] = []

    async def write(message: int) -> None:
        pass

    with watched(write, 0.01, late.append) as watched_write:
        await watched_write(0)
        await asyncio.sleep(0.1)  # ten times the limit
        await watched_write(1)
    assert late == []


def calls_ended(face: Any) -> float:
    samples = [sample for family in face.server.registry.collect() for sample in family.samples]
    return sum(one.value for one in samples if one.name == "halfmoon_grpc_calls_total" and one.labels["method"] == "Generate")


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_client_that_does_not_read_loses_its_request(
    reads_on: bool, make_face: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    face = make_face(write_timeout_s=0.3)
    face.workers.script = lambda sequence: [5] * 400
    face.workers.gate_at = 399
    with caplog.at_level(logging.INFO), grpc.insecure_channel(face.grpc, options=SMALL_WINDOW) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        tokens = inference_pb2.TokenIds(token_ids=[5] * 8)
        call = stub.Generate(inference_pb2.GenerateRequest(tokens=tokens, max_tokens=400, num_logprobs=20))
        assert next(call).HasField("admitted")
        assert face.workers.cancelled.wait(60)
        if reads_on:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            assert "took nothing of its stream for 0.3 s" in (caught.value.details() or "")
    while calls_ended(face) != 1:
        time.sleep(0.005)
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
    assert face.num_under_way == 0
