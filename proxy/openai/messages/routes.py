"""POST /v1/messages · /v1/messages/count_tokens: Anthropic's messages, as chats."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ...requests.generation import Generator
from ..asked import asked
from ..encoded import PartsResponse, to_json
from ..event_writer import reply
from .bodies import CountTokensBody, MessagesBody
from .described import CountTokensReply, MessagesReply, messages_replies, streamed_messages
from .errors import ROUTE
from .replies import MessageWriter


def add_messages(app: FastAPI, generator: Generator) -> None:
    @app.post(ROUTE, responses=streamed_messages(MessagesReply))
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answers a conversation in Anthropic's form."""
        generation = await generator.open(asked(body, request))
        request_id: str = request.state.request_id
        headers = {"x-request-id": request_id, "request-id": request_id}
        return await reply(request, generation, MessageWriter(generation, ROUTE), stream=bool(body.stream), headers=headers)

    @app.post(f"{ROUTE}/count_tokens", responses=messages_replies(CountTokensReply, 404, 413, 415))
    async def count_tokens(body: CountTokensBody) -> Response:
        """How many tokens the prompt of such a message has."""
        num_tokens = len(await generator.tokenize(body.to_generate_request()))
        return PartsResponse([to_json({"input_tokens": num_tokens}).encode()])
