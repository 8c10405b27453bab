"""POST /v1/messages · /v1/messages/count_tokens: Anthropic's messages, as chats."""

from __future__ import annotations

import contextlib

from fastapi import FastAPI, Request
from fastapi.responses import Response

from ...requests.generation import Generator
from ..asked import asked
from ..encoded import PartsResponse, to_json
from ..event_stream import EventStream, until_disconnect
from .bodies import CountTokensBody, MessagesBody
from .described import CountTokensReply, MessagesReply, messages_replies, streamed_messages
from .errors import ROUTE
from .replies import EventWriter, whole_message


def add_messages(app: FastAPI, generator: Generator) -> None:
    @app.post(ROUTE, responses=streamed_messages(MessagesReply))
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answers a conversation in Anthropic's form."""
        generation = await generator.open(asked(body, request))
        request_id: str = request.state.request_id
        headers = {"x-request-id": request_id, "request-id": request_id}
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(generation)
            if not body.stream:
                found = await until_disconnect(request.receive, whole_message(generation))
                return PartsResponse([to_json(found).encode()], headers)
            writer = EventWriter(generation, ROUTE)
            # the status line waits for the first event, so an error before it still gets its own status
            first = await until_disconnect(request.receive, writer.next())
            stack.pop_all()  # from here on the stream closes the generation
            return EventStream(generation, first, writer, headers)

    @app.post(f"{ROUTE}/count_tokens", responses=messages_replies(CountTokensReply, 404, 413, 415))
    async def count_tokens(body: CountTokensBody) -> Response:
        """How many tokens the prompt of such a message has."""
        num_tokens = len(await generator.tokenize(body.to_generate_request()))
        return PartsResponse([to_json({"input_tokens": num_tokens}).encode()])
