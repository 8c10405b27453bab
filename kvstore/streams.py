"""Reading and writing a grpc.aio stream message by message, the same on both sides."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


async def read_next(stream: Any) -> Any | None:
    """The next message of a call or a servicer context; None at the end of the stream."""
    message = await stream.read()
    return None if message is _EOF else message


class WholeWrites:
    """Writes of one stream by one task. gRPC ends no call while a message is on its way: close() comes before the task is cancelled."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False

    async def write(self, message: Any) -> None:
        if self._is_closed:
            await asyncio.Event().wait()  # to be cancelled
        self._idle.clear()
        try:
            await self._stream.write(message)
        finally:
            self._idle.set()

    async def close(self) -> None:
        """Returns once no message is on its way, and none will be."""
        self._is_closed = True
        await self._idle.wait()
