"""A generation as a reply, whole or as server-sent events. Each route writes them in its own form."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response

from ...protocol.errors import HalfmoonError
from ..requests.generation import Generation, GenerationEvent
from .encoded import PartsResponse
from .errors import typed
from .event_stream import EventStream, until_disconnect


class EventWriter:
    """path: the route's, which the wording of errors depends on."""

    def __init__(self, generation: Generation, path: str) -> None:
        self._generation = generation
        self._path = path
        self._begun = False
        self._over = False

    async def next(self) -> bytes:
        """The next events; b"" at the end. An error before the first event is raised; a later one is sent as an event."""
        while not self._over:
            try:
                events = await self._generation.next_events()
            except Exception as error:  # the process boundary: a client must learn of every end, even if a bug caused it
                if not self._begun:
                    raise
                self._over = True
                return self._failed(typed(error, self._path))
            self._over = not events
            if found := await self._written(events):
                self._begun = True
                return found
        return b""

    async def whole(self) -> list[bytes]:
        """The reply at the end, in parts. Instead of next(). Raises what ended the generation."""
        raise NotImplementedError

    async def _written(self, events: Sequence[GenerationEvent]) -> bytes:
        """events: none: the generation is over."""
        raise NotImplementedError

    def _failed(self, error: HalfmoonError) -> bytes:
        raise NotImplementedError


async def reply(request: Request, generation: Generation, writer: EventWriter, *, stream: bool, headers: dict[str, str]) -> Response:
    """The generation is closed however the reply ends."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(generation)
        if not stream:
            return PartsResponse(await until_disconnect(request.receive, writer.whole()), headers)
        # the status line waits for the first event, so an error before it still gets its own status
        first = await until_disconnect(request.receive, writer.next())
        stack.pop_all()  # from here on the stream closes the generation
        return EventStream(generation, first, writer, headers)
