"""Reads and checks the body of a POST. No body holds up the event loop, however long or odd it is.

content-type ─► http.request … ─► at most max_body_bytes, in body_timeout_s ─► JSON ─► its pydantic model ─► FastAPI's handler,
     └─ other: a 415                   └─ more: a 413   └─ later: a 408          ├── in a thread from INLINE_BYTES on    which finds
                                                                                 └── in a process from LARGE_BYTES on    the work done
"""

from __future__ import annotations

import asyncio
import email.message
import json
import reprlib
import time
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ...protocol.config import ProxyConfig
from ...protocol.errors import InvalidRequest, RequestCancelled, RequestTimeout, RequestTooLarge, UnsupportedMediaType, shown
from ..request_process import LARGE_BYTES, Packed, RequestProcess, pack, unpack_messages, unpack_prompts
from .messages.bodies import CountTokensBody
from .responses_body import ResponsesBody
from .tokenize import DetokenizeBody, TokenizeBody
from .types import ChatBody, CompletionBody, GenerateBody

Body = GenerateBody | ResponsesBody | TokenizeBody | DetokenizeBody | CountTokensBody
CHATS = (ChatBody, ResponsesBody, TokenizeBody, CountTokensBody)
"""Bodies that may have a chat."""

INLINE_BYTES = 2**16  # about a millisecond
GZIP = "gzip"

_shown = reprlib.Repr()
_shown.maxlist = _shown.maxdict = 40
_shown.maxstring = _shown.maxlong = 200
_shown.maxlevel = 3


def body_route(process: RequestProcess, limits: ProxyConfig) -> type[APIRoute]:
    """A class for routes whose body, if they take one, is a pydantic model in JSON."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle
            body_type: type[Body] = self.body_field.field_info.annotation  # pyright: ignore[reportAssignmentType] - the app's

            async def handle_read(request: Request) -> Response:
                request.state.arrival = time.monotonic()  # the head is here; the body may take long
                _require_json(request)
                content = await _read(request, limits)
                if request.headers.get("content-encoding", "").strip().lower() == GZIP:
                    content = await asyncio.to_thread(_unzipped, content, limits.max_body_bytes)
                model = await _parse_aside(body_type, content, process) if content else None
                return await handle(_ReadRequest(request, content, model))

            return handle_read

    return BodyRoute


async def _parse_aside(body_type: type[Body], content: bytes, process: RequestProcess) -> Body:
    """Raises as _parse does."""
    if len(content) <= INLINE_BYTES:
        return _parse(body_type, content)
    if len(content) <= LARGE_BYTES:
        return await asyncio.to_thread(_parse, body_type, content)
    return await _unpack(body_type, await process.run(parse_packed, body_type, content))


class _ReadRequest(Request):
    """The same request with its body already read. pydantic accepts a model as it is and does not check it again."""

    def __init__(self, request: Request, content: bytes, model: Body | None) -> None:
        super().__init__(request.scope, request.receive)
        self._content = content
        self._model = model

    async def body(self) -> bytes:
        return self._content

    async def json(self) -> Any:
        return self._model


async def _read(request: Request, limits: ProxyConfig) -> bytes:
    """Raises RequestTooLarge: at once if content-length says so, else at the first byte too many; RequestTimeout.

    RequestCancelled where the client leaves before its end.
    """
    told, limit = request.headers.get("content-length", ""), limits.max_body_bytes
    if told.isdecimal() and int(told) > limit:
        raise _too_large(f"{told} bytes", limit)
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                content += part
                if len(content) > limit:
                    raise _too_large("more bytes", limit)
    except ClientDisconnect:
        raise RequestCancelled("the client closed the connection before its body had come") from None
    except TimeoutError:
        raise RequestTimeout(
            f"the body did not end within {limits.body_timeout_s:g} s ({len(content)} bytes came); send it again, or raise "
            "proxy.body_timeout_s"
        ) from None
    return bytes(content)


def _unzipped(content: bytes, limit: int) -> bytes:
    """Raises RequestTooLarge at the first byte too many, InvalidRequest for what is no gzip or ends early."""
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        found = reader.decompress(content, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not gzip, as its content-encoding says: {error}") from error
    if len(found) > limit:
        raise _too_large("more bytes once it is unpacked", limit)
    if not reader.eof:
        raise InvalidRequest("the body's gzip ends before its end")
    return found


def _too_large(what: str, limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has {what}; it may have {limit} ({limit / 2**20:g} MiB)", max_body_bytes=limit)


def _require_json(request: Request) -> None:
    """Raises UnsupportedMediaType. A request without any body is not this function's to refuse."""
    encoding, kind = request.headers.get("content-encoding", ""), request.headers.get("content-type", "")
    if encoding.strip().lower() not in ("", "identity", GZIP):
        raise UnsupportedMediaType(f"content-encoding is {shown(encoding)}; send the body uncompressed, or as gzip")
    if not _is_json(kind) and (kind or request.headers.get("content-length", "") != "0"):
        raise UnsupportedMediaType(f"content-type is {shown(kind)}; the body must be JSON, sent with content-type: application/json")


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return bool(content_type) and message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _parse(body_type: type[Body], content: bytes) -> Body:
    """Raises InvalidRequest, or RequestValidationError with the first fault only, its value short enough to show."""
    try:
        return body_type.model_validate(json.loads(content))
    except json.JSONDecodeError as error:
        wrong = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}, "ctx": {"error": error.msg}}
        raise RequestValidationError([wrong]) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: byte {error.start} is no UTF-8") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deep") from error
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise InvalidRequest(f"the body is not JSON: {error}") from error  # an integer of thousands of digits
        first = error.errors(include_url=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"]), "input": _Shown(first["input"])}]) from error


def parse_packed(body_type: type[Body], content: bytes) -> Packed[dict[str, Any]] | list[Any]:
    """As _parse; the rest are the model's other fields. Returns the errors of a RequestValidationError as a list. Runs in the process."""
    try:
        body = _parse(body_type, content)
    except RequestValidationError as error:
        return list(error.errors())
    fields = {name: getattr(body, name) for name in body.model_fields_set}
    if isinstance(body, CompletionBody):
        del fields["prompt"]
        return pack(fields, prompts=body.prompts)
    if isinstance(body, DetokenizeBody):
        del fields["tokens"]
        return pack(fields, prompts=[body.tokens])
    assert isinstance(body, CHATS)
    for name in ("messages", "system", "input"):
        fields.pop(name, None)
    return pack(fields, messages=body.chat)


async def _unpack(body_type: type[Body], packed: Packed[dict[str, Any]] | list[Any]) -> Body:
    """Raises RequestValidationError. What was checked in the process is not checked again."""
    if isinstance(packed, list):
        raise RequestValidationError(packed)
    if issubclass(body_type, CompletionBody):
        return body_type.model_construct(**packed.rest, prompt=unpack_prompts(packed))
    if issubclass(body_type, DetokenizeBody):
        return body_type.model_construct(**packed.rest, tokens=unpack_prompts(packed)[0])
    messages = await unpack_messages(packed)
    of_a_chat: dict[str, Any] = {"input" if issubclass(body_type, ResponsesBody) else "messages": []}
    fields: dict[str, Any] = packed.rest | (of_a_chat if messages or not issubclass(body_type, TokenizeBody) else {})
    body = body_type.model_construct(**fields)
    if isinstance(body, CHATS) and messages:
        body.chat = messages
    return body


class _Shown:
    """A value of any size as an error shows it."""

    def __init__(self, value: Any) -> None:
        self._text = _shown.repr(value)

    def __repr__(self) -> str:
        return self._text
