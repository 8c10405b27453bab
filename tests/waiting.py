"""How tests wait: for an event, with a bound that only a hang reaches. `from halfmoon.tests.waiting import until, within`"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_EVERY_S = 0.005
HANGS_AFTER_S = 60.0


async def within(seconds: float, awaitable: Awaitable[T]) -> T:
    """seconds: on a quiet machine. Far below a request's own 600 s on any: what comes was brought by an event, not by the deadline."""
    return await asyncio.wait_for(awaitable, 30 * seconds)


async def until(condition: Callable[[], object]) -> None:
    """condition: looked at in turns of the event loop, where nothing tells of its change."""
    async with asyncio.timeout(HANGS_AFTER_S):
        while not condition():
            await asyncio.sleep(LOOK_EVERY_S)
