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
    """Writes of one stream by one task. gRPC ends no call while a message is on its way: who cancels the task waits for idle first."""

    def __init__(self, stream: Any) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._stream = stream

    async def write(self, message: Any) -> None:
        self.idle.clear()
        try:
            await self._stream.write(message)
        finally:
            self.idle.set()
