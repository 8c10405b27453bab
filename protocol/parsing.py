"""What a stranger sends to a gRPC server may be no message at all: the call ends with INVALID_ARGUMENT, and the log stays empty.

bytes ─► the method's own parser ─► message ─► handler
                 └─ they are none ─► Unparsable ─► ours: the boundary, or the first look at it, raises InvalidRequest
                                                └► another maker's: the call is aborted before its handler sees it
Left to gRPC, the status would be UNKNOWN, with a traceback in the log.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from .errors import InvalidRequest

OURS = "/halfmoon."
REASON = "what was sent is no message of this method; use the stubs made from its .proto file"


class Unparsable:
    """Stands where a message would. Whoever looks at it gets InvalidRequest."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InvalidRequest(REASON)


class Parsing(grpc.aio.ServerInterceptor):
    """For every method of a server."""

    def __init__(self) -> None:
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        method = handler_call_details.method
        found = self._handlers.get(method)
        if found is None:
            handler = await continuation(handler_call_details)
            if handler is None:  # there is no such method, and there is no end of names: none is kept
                return None
            found = self._handlers[method] = _guarded(handler, is_ours=method.startswith(OURS))
        return found


def _guarded(handler: Any, *, is_ours: bool) -> Any:
    changes: dict[str, Any] = {}
    if handler.request_deserializer is not None:
        changes["request_deserializer"] = partial(_parse, handler.request_deserializer)
    if not is_ours:
        for kind in ("unary_unary", "unary_stream", "stream_stream"):
            behavior = getattr(handler, kind)
            if inspect.iscoroutinefunction(behavior):
                changes[kind] = partial(_called, behavior)
            elif kind == "stream_stream" and inspect.isasyncgenfunction(behavior):
                changes[kind] = _streaming(behavior)
    return handler._replace(**changes)


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        return Unparsable()


async def _called(behavior: Callable[..., Awaitable[Any]], request: Any, context: Any) -> Any:
    if isinstance(request, Unparsable):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, REASON)
    return await behavior(request, context)


def _streaming(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def streamed(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for reply in behavior(_parsed(requests, context), context):
            yield reply

    return streamed


async def _parsed(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Unparsable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, REASON)
        yield request
