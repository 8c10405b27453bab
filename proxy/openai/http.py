"""The OpenAI-compatible HTTP face.

POST /v1/completions · /v1/chat/completions ─► GenerateRequest ─► Generation ─► one JSON body, or server-sent events ─► [DONE]
GET  /v1/models · /v1/models/{id}       /health: the process lives    /ready: it can serve    /metrics: Prometheus
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from ...protocol.errors import UnknownModel
from ..requests.generate_request import GenerateRequest
from ..requests.generation import ChoiceEnd, Generation, Generator
from ..requests.readiness import missing_parts
from . import errors
from .body import BodyRoute
from .event_stream import EventStream, sse, to_json, until_disconnect
from .replies import ChatShape, CompletionShape, Shape, WholeChoice
from .types import ChatBody, CompletionBody

DONE = b"data: [DONE]\n\n"


def create_app(generator: Generator, registry: CollectorRegistry) -> FastAPI:
    app = FastAPI(title="Halfmoon", docs_url=None, redoc_url=None)
    errors.install(app)
    app.router.route_class = BodyRoute
    started = int(time.time())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        asked = _stamped(body.to_generate_request(_request_id(request)), request)
        generation = await generator.open(asked)
        echoes = [prompt if isinstance(prompt, str) else generator.decode(prompt) for prompt in body.prompts] if body.echo else []
        shape = CompletionShape(generation, n=asked.n, wants_logprobs=body.logprobs is not None, echoes=echoes)
        return await _reply(request, generation, shape, stream=bool(body.stream), wants_usage=body.wants_usage)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        asked = _stamped(body.to_generate_request(_request_id(request)), request)
        generation = await generator.open(asked)
        shape = ChatShape(generation, n=asked.n, wants_logprobs=bool(body.logprobs))
        return await _reply(request, generation, shape, stream=bool(body.stream), wants_usage=body.wants_usage)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(generator, started)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != generator.card.name:
            raise UnknownModel(f"the model {name!r} is not served; {generator.card.name!r} is", param="model")
        return _json(_model(generator, started))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        missing = missing_parts(generator.router)
        return _json({"ready": not missing, "missing": missing}, status=503 if missing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return app


async def _reply(request: Request, generation: Generation, shape: Shape, *, stream: bool, wants_usage: bool) -> Response:
    headers = {"x-request-id": generation.request_id}
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(generation)
        if not stream:
            choices = await until_disconnect(request.receive, _collect(generation))
            return _json(shape.whole(choices), headers=headers)
        events = _events(generation, shape, wants_usage, request.url.path)
        # the status line waits for the first event: an error before it still has its own status
        first = await until_disconnect(request.receive, _next(events))
        stack.pop_all()  # from here on the stream closes it
        return EventStream(generation, first, events, headers)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _collect(generation: Generation) -> list[WholeChoice]:
    choices = [WholeChoice(index) for index in range(generation.num_choices)]
    async for event in generation:
        choice = choices[event.index]
        if isinstance(event, ChoiceEnd):
            choice.end = event
        else:
            choice.texts.append(event.text)
            choice.token_texts.extend(event.token_texts)
    return choices


async def _events(generation: Generation, shape: Shape, wants_usage: bool, path: str) -> AsyncGenerator[bytes, None]:
    """The first one raises what went wrong before it; from then on an error is an event."""
    begun = False
    opened: set[int] = set()
    ends: list[ChoiceEnd] = []
    try:
        async for event in generation:
            if event.index not in opened:
                opened.add(event.index)
                if (opening := shape.opening(event.index)) is not None:
                    yield sse(_chunk(opening, wants_usage))
                    begun = True
            if isinstance(event, ChoiceEnd):
                ends.append(event)
                yield sse(_chunk(shape.last_chunk(event), wants_usage))
                begun = True
            elif event.text or event.token_texts:
                yield sse(_chunk(shape.chunk(event.index, event.text, event.token_texts), wants_usage))
                begun = True
    except Exception as error:  # the process boundary: a client must learn of every end, a bug's too
        if not begun:
            raise
        yield sse(errors.error_body(errors.typed(error, path), path))
        return
    if wants_usage:
        yield sse(shape.usage_chunk(ends))
    yield DONE


def _chunk(chunk: dict[str, Any], wants_usage: bool) -> dict[str, Any]:
    """With include_usage, OpenAI's chunks carry the field in each of them, null but in the last."""
    return chunk | {"usage": None} if wants_usage else chunk


def _request_id(request: Request) -> str:
    """The client's own x-request-id, or a new one; it stands in the reply's header, in the logs, and in Cancel."""
    request.state.request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    return request.state.request_id


def _stamped(asked: GenerateRequest, request: Request) -> GenerateRequest:
    """Times to the first token count from the request's head, and not from when its body was read."""
    return dataclasses.replace(asked, arrival=request.state.arrival)


def _model(generator: Generator, created: int) -> dict[str, Any]:
    card = {"id": generator.card.name, "object": "model", "created": created, "owned_by": "halfmoon"}
    return card | {"max_model_len": generator.max_model_len}


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
