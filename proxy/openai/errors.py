"""Errors in OpenAI's shape, whatever raised them: {"error": {"message", "type", "param", "code"}}.

HalfmoonError · a body that pydantic refuses · an unknown route or method · a bug  ─► status, headers, body
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ...protocol.errors import HalfmoonError, InternalError, InvalidRequest, Overloaded, PromptTooLong, RequestTimeout, UnknownModel, shown
from ..face_metrics import FaceMetrics
from .messages.bodies import CountTokensBody, MessagesBody
from .messages.errors import ROUTE, is_of_messages, messages_error, messages_status
from .responses_body import HINTS as RESPONSES_HINTS
from .responses_body import ResponsesBody
from .tokenize import DetokenizeBody, TokenizeBody
from .types import HINTS, ChatBody, CompletionBody

logger = logging.getLogger(__name__)

MAX_NAME_LEN = 80  # of a field; all known ones are shorter
UNAVAILABLE_RETRY_S = 1
OPENAI_CODES: dict[type[HalfmoonError], str] = {PromptTooLong: "context_length_exceeded", UnknownModel: "model_not_found"}
"""Codes that clients look for, where ours differ."""
_OF_ARGUMENTS = ("str", "dict[str,any]", "string", "items")  # pydantic's names for the types that they may have
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# OpenAI's and vLLM's names for fields that SamplingParams and GenerateRequest name differently
_COMMON_NAMES = {"timeout_s": "timeout", "ttft_slo_s": "slo.ttft", "tpot_slo_s": "slo.tpot", "num_prompt_logprobs": "prompt_logprobs"}
_NAMES = {"/v1/completions": {"num_logprobs": "logprobs"}, "/v1/chat/completions": {"num_logprobs": "top_logprobs"}}
_HINTS = {"/v1/responses": RESPONSES_HINTS}
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    ROUTE: MessagesBody,
    f"{ROUTE}/count_tokens": CountTokensBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def error_body(error: HalfmoonError, path: str) -> dict[str, Any]:
    names = _COMMON_NAMES | _NAMES.get(path, {})
    message, param = error.message, error.fields.get("param")
    if param in names:
        message, param = message.replace(param, names[param]), names[param]
    code = next((name for kind, name in OPENAI_CODES.items() if isinstance(error, kind)), error.code)
    kind = _TYPES.get(error.http_status, "invalid_request_error" if error.http_status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(request: Request, error: HalfmoonError, status: int | None = None) -> JSONResponse:
    """status: another than the error's."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1e3)))  # OpenAI's own client reads this one first
    if error.http_status == 503:
        headers["retry-after"] = str(UNAVAILABLE_RETRY_S)
    if isinstance(error, RequestTimeout):
        headers["connection"] = "close"  # the rest of the body may never come
    request_id = getattr(request.state, "request_id", None)
    if request_id is not None:
        headers["x-request-id"] = request_id
    if is_of_messages(request.url.path):
        if request_id is not None:
            headers["request-id"] = request_id
        return JSONResponse(messages_error(error, status), status or messages_status(error), headers)
    return JSONResponse(error_body(error, request.url.path), status or error.http_status, headers)


def typed(error: Exception, path: str) -> HalfmoonError:
    """An error of the tree as it is. Any other is a bug and is logged."""
    if isinstance(error, HalfmoonError):
        return error
    logger.error("%s failed", path, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}; the proxy's log has the traceback")


def install_error_handlers(app: FastAPI, faces: FaceMetrics) -> None:
    def refuse(request: Request, error: HalfmoonError, status: int | None = None) -> JSONResponse:
        faces.refused("http", error.code)
        return error_response(request, error, status)

    @app.exception_handler(HalfmoonError)
    async def on_halfmoon_error(request: Request, error: HalfmoonError) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_refused_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(request, _refused_body(error.errors(), request))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = refuse(request, InvalidRequest(_route_message(request, error)), error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:  # the process boundary
        return refuse(request, typed(error, request.url.path))


def _route_message(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no route {request.url.path}; see /openapi.json for those there are"
    if error.status_code == 405:
        return f"{request.url.path} does not take {request.method}; use {(error.headers or {}).get('Allow', 'another method')}"
    return str(error.detail)


def _refused_body(errors: Sequence[Any], request: Request) -> InvalidRequest:
    """pydantic's first complaint, in words that name the field, its value and what is allowed."""
    first = errors[0]
    location = first["loc"][1:]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if not location:
        return InvalidRequest("the body must be a JSON object, sent with content-type: application/json")
    location = [part if isinstance(part, int) else part[:MAX_NAME_LEN] for part in location]
    field = str(location[0])
    if first["type"] == "extra_forbidden" and len(location) == 1:
        known = _BODIES[request.url.path].model_fields
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.6)
        return InvalidRequest(f"{field} is not a known field" + (f"; did you mean {near[0]}?" if near else ""), param=field)
    if first["type"] == "missing":
        return InvalidRequest(f"{_path(location)} is missing", param=_path(location))
    hints = HINTS | _HINTS.get(request.url.path, {})
    if field in hints and request.url.path.startswith("/v1/") and not is_of_messages(request.url.path):
        return InvalidRequest(f"{field} is {shown(first['input'])}; it must be {hints[field]}", param=field)
    return InvalidRequest(f"{_path(location)} is {shown(first['input'])}: {_lowered(first['msg'])}", param=_path(location))


def _path(location: Sequence[int | str]) -> str:
    """("messages", 0, "content", "str") -> messages[0].content. Parts after a list item's field are pydantic's own, but for tools."""
    path = str(location[0])
    parts = (
        [part for part in location[1:] if part not in _OF_ARGUMENTS] if {"input", "tools", "tool_calls"} & set(location) else location[1:3]
    )
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
