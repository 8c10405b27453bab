"""The OpenAI-compatible HTTP face.

POST /v1/completions · /v1/chat/completions · /v1/responses ─► GenerateRequest ─► Generation ─► one JSON body, or server-sent events
POST /v1/messages · /v1/messages/count_tokens: Anthropic's (messages/)
GET  /: the page, and what it reads (proxy/page)
POST /tokenize · /detokenize
GET  /v1/models · /v1/models/{id}       /health, /ping: the process lives    /ready: it can serve    /version
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp

from ...protocol.errors import UnknownModel
from ...protocol.version import package_version
from ..page.routes import add_page
from ..request_process import RequestProcess
from ..requests.generate_request import no_such_model
from ..requests.generation import Generation, Generator
from ..requests.readiness import missing_parts
from ..tenants.gate import Gate
from .asked import asked
from .body import body_route
from .browsers import for_browsers
from .chunks import ChunkWriter
from .counted import counted
from .described import (
    ChatReply,
    CompletionReply,
    DescribedApp,
    DetokenizeReply,
    HealthReply,
    ModelReply,
    ModelsReply,
    ReadyReply,
    TokenizeReply,
    VersionReply,
    replies,
    streamed,
)
from .encoded import PartsResponse, to_json
from .errors import install_error_handlers
from .event_writer import reply
from .head import head_as_get
from .keyed import keyed
from .messages.routes import add_messages
from .replies import ChatShape, CompletionShape, Shape
from .responses_body import ResponsesBody, told_by_own_names
from .responses_described import responses_streamed
from .responses_reply import ResponseWriter, echo_of
from .tokenize import DetokenizeBody, TokenizeBody, tokenized_json
from .types import ChatBody, CompletionBody, GenerateBody


def create_app(generator: Generator, process: RequestProcess, gate: Gate | None = None) -> ASGIApp:
    """gate: asks for an API key. None: nobody is asked."""
    faces = generator.router.metrics.faces
    app = counted(keyed(head_as_get(_routes(generator, process, shows_requests=gate is None)), gate, faces), faces)
    return for_browsers(app, generator.router.config.cors_origins.split())


def _routes(generator: Generator, process: RequestProcess, *, shows_requests: bool) -> FastAPI:
    app = DescribedApp(title="Halfmoon", docs_url=None, redoc_url=None)
    install_error_handlers(app, generator.router.metrics.faces)
    app.router.route_class = body_route(process, generator.router.config)

    if generator.router.config.page:
        add_page(app, generator, shows_requests=shows_requests)

    @app.post("/v1/completions", responses=streamed(CompletionReply))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues a prompt, or several."""
        generate_request = asked(body, request)
        generation = await generator.open(generate_request)
        echoes = await generator.decode_aside(body.prompts) if body.echo else []
        shape = CompletionShape(
            generation, n=generate_request.n, wants_logprobs=body.logprobs is not None, echoes=echoes, forms=body.prompt_forms
        )
        return await _reply(request, generation, shape, body)

    @app.post("/v1/chat/completions", responses=streamed(ChatReply))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a conversation, by the model's chat template."""
        generate_request = asked(body, request)
        generation = await generator.open(generate_request)
        shape = ChatShape(generation, n=generate_request.n, wants_logprobs=bool(body.logprobs), forms=body.prompt_forms)
        return await _reply(request, generation, shape, body)

    @app.post("/v1/responses", responses=responses_streamed())
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answers a conversation, in the form of OpenAI's Responses. Nothing is stored."""
        echo = await echo_of(body)
        with told_by_own_names():
            generation = await generator.open(asked(body, request))
        writer = ResponseWriter(generation, echo, request.url.path)
        return await reply(request, generation, writer, stream=bool(body.stream), headers=_headers(request))

    add_messages(app, generator)
    _add_tokens(app, generator)
    _add_models(app, generator)
    _add_states(app, generator)
    return app


def _add_tokens(app: FastAPI, generator: Generator) -> None:
    @app.post("/tokenize", responses=replies(TokenizeReply, 404, 413, 415))
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a text, or of a chat by the model's template."""
        token_ids = await generator.tokenize(body.to_generate_request())
        with_texts = bool(body.return_token_strs)
        return PartsResponse(await tokenized_json(generator.tokenizer, token_ids, generator.max_model_len, with_texts=with_texts))

    @app.post("/detokenize", responses=replies(DetokenizeReply, 404, 413, 415))
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of tokens, special ones included."""
        return _json({"prompt": await generator.detokenize(body.model or "", body.tokens)})


def _add_models(app: FastAPI, generator: Generator) -> None:
    started = int(time.time())

    @app.get("/v1/models", responses=replies(ModelsReply))
    async def models() -> Response:
        """The model that is served."""
        return _json({"object": "list", "data": [_model(generator, started)]})

    @app.get("/v1/models/{name:path}", responses=replies(ModelReply, 404))
    async def model(name: str) -> Response:
        """One model, by its name."""
        if name != generator.card.name:
            raise UnknownModel(no_such_model(name, generator.card.name), param="model")
        return _json(_model(generator, started))


def _add_states(app: FastAPI, generator: Generator) -> None:
    @app.get("/health", responses=replies(HealthReply))
    async def health() -> Response:
        """200: the process lives."""
        return _json({"status": "ok"})

    @app.get("/ping", responses=replies(HealthReply))
    @app.post("/ping", responses=replies(HealthReply))
    async def ping() -> Response:
        """As /health, where SageMaker looks for it."""
        return _json({"status": "ok"})

    @app.get("/version", responses=replies(VersionReply))
    async def version() -> Response:
        """Halfmoon's."""
        return _json({"version": package_version()})

    @app.get("/ready", responses=replies(ReadyReply) | {503: {"model": ReadyReply, "description": "It can't serve yet."}})
    async def ready() -> Response:
        """200: it can serve. 503: `missing` says what it lacks."""
        missing = missing_parts(generator.router)
        return _json({"ready": not missing, "missing": missing}, status=503 if missing else 200)


async def _reply(request: Request, generation: Generation, shape: Shape, body: GenerateBody) -> Response:
    writer = ChunkWriter(generation, shape, request.url.path, usage=body.wants_usage, running_usage=body.wants_running_usage)
    return await reply(request, generation, writer, stream=bool(body.stream), headers=_headers(request))


def _headers(request: Request) -> dict[str, str]:
    return {"x-request-id": request.state.request_id}


def _model(generator: Generator, created: int) -> dict[str, Any]:
    card = {"id": generator.card.name, "object": "model", "created": created, "owned_by": "halfmoon"}
    return card | {"max_model_len": generator.max_model_len}


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")
