"""Work for an HTTP client that may leave while it waits for a whole reply or reads a stream.

receive ─► http.disconnect ─► the work is cancelled, and with it the request in the whole cluster
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...protocol.errors import RequestCancelled
from ...protocol.tasks import beside
from ..requests.generation import Generation

Result = TypeVar("Result")


class Writer(Protocol):
    async def next(self) -> bytes:
        """The next events; b"" at the end."""
        ...


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result. Raises RequestCancelled if the client leaves; the work has ended by then.

    Args:
        receive: of a request whose body has been read, so that the next message is its disconnect.
    """
    async with beside(work) as task, beside(_disconnected(receive)) as watch:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("the client closed the connection")
        return task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: `first`, then what the writer gives. The generation is closed however the stream ends."""

    def __init__(self, generation: Generation, first: bytes, writer: Writer, headers: dict[str, str]) -> None:
        super().__init__(headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation = generation
        self._first = first
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            try:
                await until_disconnect(receive, self._send_all(send))
            except RequestCancelled:
                pass  # the client has left

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        part = self._first
        while part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await self._writer.next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
