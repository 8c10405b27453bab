"""Writes to a gRPC client that may not read: gRPC takes a message once there is room for it, and a client decides when that is.

write ─► taken ─► write …      not taken within limit_s ─► the call is dropped: what it holds is freed, the client sees CANCELLED
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)
Write = Callable[[Any], Awaitable[None]]


@contextlib.asynccontextmanager
async def watched(write: Write, limit_s: float) -> AsyncIterator[Write]:
    """Gives a write() for the block. Raises CancelledError where one is not taken in time.

    No other end reaches such a client: gRPC can't send a status behind a message that is on its way.
    """
    loop = asyncio.get_running_loop()
    began: float | None = None  # the write under way
    timer: asyncio.TimerHandle | None = None

    async def watched_write(message: Any) -> None:
        nonlocal began
        began = loop.time()
        await write(message)
        began = None

    def look() -> None:  # one timer for the stream, since one for each token would cost more than the token
        nonlocal timer
        left_s = limit_s if began is None else began + limit_s - loop.time()
        if left_s <= 0:
            timeout.reschedule(loop.time())
        else:
            timer = loop.call_later(left_s, look)

    try:
        async with asyncio.timeout(None) as timeout:
            look()
            try:
                yield watched_write
            finally:
                if timer is not None:
                    timer.cancel()
    except TimeoutError:
        logger.info("a client took nothing of its stream for %g s; its call is dropped", limit_s)
        raise asyncio.CancelledError from None
