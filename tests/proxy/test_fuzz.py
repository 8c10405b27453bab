"""Anything at the proxy's gRPC port: a typed answer, an empty log, and a proxy that serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVICES = [found for module in (inference_pb2, health_pb2, reflection_pb2) for found in module.DESCRIPTOR.services_by_name.values()]
CONTROL = list(control_pb2.DESCRIPTOR.services_by_name.values())


def test_anything_at_the_proxy_gets_a_typed_answer(make_face: Callable[..., Any], fuzz: Any, caplog: pytest.LogCaptureFixture) -> None:
    face = make_face()
    statuses = fuzz(face.grpc, SERVICES)
    assert statuses["INVALID_ARGUMENT"] > 10 and statuses["OK"] > 10
    token = face.control.credentials.metadata
    statuses = fuzz(face.control.address, CONTROL, frozenset({"Drain"}), token)  # a drained proxy refuses everything else
    assert statuses["INVALID_ARGUMENT"] > 2 and statuses["OK"] > 2, statuses
    assert fuzz(face.control.address, CONTROL).keys() == {"UNAUTHENTICATED"}, "without the token nothing is even parsed"
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    with grpc.insecure_channel(face.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        replies = list(stub.Generate(inference_pb2.GenerateRequest(prompt="x", max_tokens=3), timeout=60))
    assert replies[-1].HasField("finished")
    with grpc.insecure_channel(face.control.address) as channel, pytest.raises(grpc.RpcError) as caught:
        control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest(timeout_s=math.nan), timeout=60, metadata=token)
    assert "timeout_s is NaN" in str(caught.value)
    fuzz(face.control.address, CONTROL, frozenset({"Join", "Status", "MemberIds", "Explain"}), token)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
