"""Writes to a gRPC client that may not read: gRPC takes a message once there is room for it, and a client decides when that is.

write ─► taken ─► write …      not taken within limit_s ─► on_late; the write goes on, since no status can overtake a message
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)
Write = Callable[[Any], Awaitable[None]]


@contextlib.contextmanager
def watched(write: Write, limit_s: float, on_late: Callable[[str], None]) -> Iterator[Write]:
    """Gives a write() for the block. on_late: frees what the call holds; it gets the reason, and is called once."""
    loop = asyncio.get_running_loop()
    began: float | None = None  # the write under way

    async def watched_write(message: Any) -> None:
        nonlocal began
        began = loop.time()
        await write(message)
        began = None

    def look() -> None:  # one timer for the stream, since one for each token would cost more than the token
        nonlocal timer
        left_s = limit_s if began is None else began + limit_s - loop.time()
        if left_s > 0:
            timer = loop.call_later(left_s, look)
            return
        logger.info("a client took nothing of its stream for %g s; its request is cancelled", limit_s)
        on_late(f"the client took nothing of its stream for {limit_s:g} s")

    timer = loop.call_later(limit_s, look)
    try:
        yield watched_write
    finally:
        timer.cancel()
