"""Reading a grpc.aio stream message by message, the same on both sides."""

from __future__ import annotations

from typing import Any

import grpc.aio

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


async def read_next(stream: Any) -> Any | None:
    """The next message of a call or a servicer context; None at the end of the stream."""
    message = await stream.read()
    return None if message is _EOF else message
