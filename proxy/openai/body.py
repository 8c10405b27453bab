"""Reads and checks the body of a POST. No body holds up the event loop, however long or odd it is.

http.request … ─► at most MAX_BODY_BYTES ─► JSON ─► its pydantic model ─► FastAPI's handler, which finds the work done
                        └─ more: a 400            ├── in a thread from INLINE_BYTES on
                                                  └── in a process from LARGE_BYTES on
"""

from __future__ import annotations

import asyncio
import email.message
import json
import reprlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ...protocol.errors import InvalidRequest, RequestCancelled
from ..request_process import LARGE_BYTES, Packed, RequestProcess, pack, unpack_messages, unpack_prompts
from .types import ChatBody, CompletionBody, GenerateBody

MAX_BODY_BYTES = 16 * 2**20  # a prompt of a million tokens, with room for JSON's escapes
INLINE_BYTES = 2**16  # about a millisecond

_shown = reprlib.Repr()
_shown.maxlist = _shown.maxdict = 40
_shown.maxstring = _shown.maxlong = 200
_shown.maxlevel = 3


def body_route(process: RequestProcess) -> type[APIRoute]:
    """A class for routes whose body, if they take one, is a pydantic model in JSON."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle
            body_type: type[GenerateBody] = self.body_field.field_info.annotation  # pyright: ignore[reportAssignmentType] - the app's

            async def handle_read(request: Request) -> Response:
                request.state.arrival = time.monotonic()  # the head is here; the body may take long
                content = await _read(request)
                if not _is_json(request.headers.get("content-type", "")):
                    content = b""  # FastAPI then refuses it as a missing body
                model = await _parse_aside(body_type, content, process) if content else None
                return await handle(_ReadRequest(request, content, model))

            return handle_read

    return BodyRoute


async def _parse_aside(body_type: type[GenerateBody], content: bytes, process: RequestProcess) -> GenerateBody:
    """Raises as _parse does."""
    if len(content) <= INLINE_BYTES:
        return _parse(body_type, content)
    if len(content) <= LARGE_BYTES:
        return await asyncio.to_thread(_parse, body_type, content)
    return await _unpack(body_type, await process.run(parse_packed, body_type, content))


class _ReadRequest(Request):
    """The same request with its body already read. pydantic accepts a model as it is and does not check it again."""

    def __init__(self, request: Request, content: bytes, model: GenerateBody | None) -> None:
        super().__init__(request.scope, request.receive)
        self._content = content
        self._model = model

    async def body(self) -> bytes:
        return self._content

    async def json(self) -> Any:
        return self._model


async def _read(request: Request) -> bytes:
    """Raises InvalidRequest for a body that is too long: at once if content-length says so, else at the first byte too many.

    RequestCancelled where the client leaves before its end.
    """
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > MAX_BODY_BYTES:
        raise _too_long(f"{told} bytes")
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY_BYTES:
                raise _too_long("more bytes")
    except ClientDisconnect:
        raise RequestCancelled("the client closed the connection before its body had come") from None
    return bytes(content)


def _too_long(what: str) -> InvalidRequest:
    limit = f"{MAX_BODY_BYTES} ({MAX_BODY_BYTES // 2**20} MiB)"
    return InvalidRequest(f"the body has {what}; it may have {limit}", max_body_bytes=MAX_BODY_BYTES)


def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return bool(content_type) and message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _parse(body_type: type[GenerateBody], content: bytes) -> GenerateBody:
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


def parse_packed(body_type: type[GenerateBody], content: bytes) -> Packed[dict[str, Any]] | list[Any]:
    """As _parse; the rest are the model's other fields. Returns the errors of a RequestValidationError as a list. Runs in the process."""
    try:
        body = _parse(body_type, content)
    except RequestValidationError as error:
        return list(error.errors())
    fields = {name: getattr(body, name) for name in body.model_fields_set}
    if isinstance(body, CompletionBody):
        del fields["prompt"]
        return pack(fields, prompts=body.prompts)
    assert isinstance(body, ChatBody)
    del fields["messages"]
    return pack(fields, messages=body.chat)


async def _unpack(body_type: type[GenerateBody], packed: Packed[dict[str, Any]] | list[Any]) -> GenerateBody:
    """Raises RequestValidationError. What was checked in the process is not checked again."""
    if isinstance(packed, list):
        raise RequestValidationError(packed)
    if issubclass(body_type, CompletionBody):
        return body_type.model_construct(**packed.rest, prompt=unpack_prompts(packed))
    body = body_type.model_construct(**packed.rest, messages=[])
    if isinstance(body, ChatBody):
        body.chat = await unpack_messages(packed)
    return body


class _Shown:
    """A value of any size as an error shows it."""

    def __init__(self, value: Any) -> None:
        self._text = _shown.repr(value)

    def __repr__(self) -> str:
        return self._text
