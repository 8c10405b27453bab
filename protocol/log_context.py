"""Names the request and its trace in every log line that is written for it, wherever the line is written.

with logged(request_id, trace): …   tasks that begin inside inherit it: asyncio copies the context
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .trace_context import TraceContext

_WHOSE: ContextVar[str] = ContextVar("halfmoon_log_whose", default="")

FORMAT = "%(asctime)s %(levelname)s %(name)s:%(whose)s %(message)s"


@contextmanager
def logged(request_id: str, trace: TraceContext | None) -> Iterator[None]:
    token = _WHOSE.set(f" [request {request_id}{f' trace {trace.trace_id}' if trace is not None else ''}]")
    try:
        yield
    finally:
        _WHOSE.reset(token)


class NameRequest(logging.Filter):
    """Of a handler: gives each record `whose`, for FORMAT."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.whose = _WHOSE.get()
        return True
