"""What a body asks for, with what the request's head says."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Protocol

from fastapi import Request

from ...protocol.trace_context import HEADER, TraceContext
from ..requests.generate_request import GenerateRequest


class Asking(Protocol):
    def to_generate_request(self) -> GenerateRequest:
        """Raises InvalidRequest."""
        ...


def asked(body: Asking, request: Request) -> GenerateRequest:
    """With its ids and its trace. TTFT counts from the request's head, and not from the end of its body.

    The reply's x-request-id is the client's own label where it has one, else our id. Raises InvalidRequest.
    """
    request_id, label = uuid.uuid4().hex, request.headers.get("x-request-id", "")
    request.state.request_id = label or request_id
    trace = TraceContext.parse(request.headers.get(HEADER))
    arrival = request.state.arrival
    tenant = getattr(request.state, "tenant", None)
    ours = {"request_id": request_id, "label": label, "arrival": arrival, "trace": trace, "tenant": tenant}
    return dataclasses.replace(body.to_generate_request(), **ours)
