"""The mapping between the error tree and gRPC: a status code for everyone, a trailer for us.

server: `await abort(context, error)`  ->  status + trailer `halfmoon-error-bin`  ->  client: `from_rpc_error(error)`
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from .errors import DeadlineExceeded, HalfmoonError, InternalError, InvalidRequest, RequestCancelled, Unavailable, build_error
from .parsing import REASON, Unparsable
from .v1 import common_pb2

TRAILER = "halfmoon-error-bin"
MAX_TRAILER_BYTES = 3000  # gRPC takes 8 KiB of metadata for granted, and a message is there twice, quoted
SHORT_MESSAGE_LEN = 250
logger = logging.getLogger(__name__)

_TOO_LARGE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")  # gRPC's own words; no handler of ours has seen the message

_LOST_WHILE_SENDING = "Internal error from Core"
"""grpc.aio's own words where a call ended while a message was being sent. They replace the status that the server gave."""

_BY_STATUS: dict[grpc.StatusCode, type[HalfmoonError]] = {
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}


async def abort(context: grpc.aio.ServicerContext, error: HalfmoonError) -> NoReturn:
    """Ends the RPC with the error's status; the trailer carries code and fields, if they are not too long for one."""
    message, trailer = error.message, json.dumps([error.code, error.message, error.fields]).encode()
    if len(trailer) > MAX_TRAILER_BYTES:
        message = f"{message[:SHORT_MESSAGE_LEN]}…"
        trailer = json.dumps([error.code, message, {}]).encode()
    await context.abort(error.grpc_status, message, ((TRAILER, trailer),))
    raise AssertionError("context.abort returned")


def from_rpc_error(error: grpc.RpcError, peer: str) -> HalfmoonError:
    """What the server raised, or what the transport's status means where no server of ours answered.

    Args:
        error: from a stub of grpc or grpc.aio.
        peer: who was called, for the message ("prefill worker 127.0.0.1:4711").
    """
    call: Any = error  # grpc types RpcError without the methods that every instance has
    status, details = call.code(), call.details()
    for key, value in call.trailing_metadata() or ():
        if key == TRAILER:
            code, message, fields = json.loads(value)
            return build_error(code, message, json.dumps(fields))
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(details or "")):
        return InvalidRequest(f"the request has {sizes[1]} bytes; {peer} takes {sizes[2]} in one message", max_bytes=int(sizes[2]))
    if status is grpc.StatusCode.INTERNAL and details == _LOST_WHILE_SENDING:
        return Unavailable(f"{peer} ended the stream", peer=peer)
    found = _BY_STATUS.get(status, InternalError)
    return found(f"{peer}: {status.name.lower().replace('_', ' ')}: {details}", peer=peer)


def error_to_proto(error: HalfmoonError) -> common_pb2.Error:
    return common_pb2.Error(code=error.code, message=error.message, fields_json=error.fields_json)


def error_from_proto(error: common_pb2.Error) -> HalfmoonError:
    return build_error(error.code, error.message, error.fields_json)


Handler = TypeVar("Handler", bound=Callable[..., Any])


def unary_boundary(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wraps a unary servicer method: an error of the tree becomes its status, any other an InternalError, logged."""

    @functools.wraps(handler)
    async def guarded(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if isinstance(request, Unparsable):
                raise InvalidRequest(REASON)
            return await handler(self, request, context)
        except HalfmoonError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # the process boundary: nothing may pass it untyped
            if client_left(error):
                raise asyncio.CancelledError from error
            await abort(context, _internal(handler, error))

    return guarded


def stream_boundary(handler: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """Does what unary_boundary does, for a servicer method that is an async generator."""

    @functools.wraps(handler)
    async def guarded(self: Any, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            if isinstance(request, Unparsable):
                raise InvalidRequest(REASON)
            async for reply in handler(self, request, context):
                yield reply
        except HalfmoonError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # the process boundary: nothing may pass it untyped
            if client_left(error):
                raise asyncio.CancelledError from error
            await abort(context, _internal(handler, error))

    return guarded


def client_left(error: Exception) -> bool:
    """The call ended while a message was on its way. A batch that gRPC does not take at all is a bug, and has other words."""
    return isinstance(error, grpc.aio.InternalError) and str(error).startswith('Failed "execute_batch"')


def _internal(handler: Callable[..., Any], error: Exception) -> InternalError:
    logger.exception("%s failed", handler.__qualname__)
    return InternalError(f"{type(error).__name__}: {error}; the server's log has the traceback")
