"""Waiting without polling: who waits on a key sleeps until notify(key), or until its deadline.

check ─► wait(key) ◄── notify(key) ─► check again        (one event loop: nothing can slip in between check and wait)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, TypeVar

from ..protocol.errors import HalfmoonError
from ..protocol.tasks import beside

Result = TypeVar("Result")


class Waiters:
    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Future[None]]] = {}

    def num_waiting(self, key: Hashable) -> int:
        return len(self._waiting.get(key, ()))

    def notify(self, key: Hashable) -> None:
        for waiter in self._waiting.get(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    def notify_all(self) -> None:
        for key in self._waiting:
            self.notify(key)

    async def wait(self, key: Hashable, deadline: float) -> bool:
        """False where the deadline (loop.time(); inf: none) comes first."""
        loop = asyncio.get_running_loop()
        if deadline <= loop.time():
            return False
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(key, set()).add(waiter)
        try:
            async with asyncio.timeout_at(None if deadline == float("inf") else deadline):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiting[key].discard(waiter)
            if not self._waiting[key]:
                del self._waiting[key]
        return True


async def until_ended(
    work: Coroutine[Any, Any, Result], ended: asyncio.Future[HalfmoonError | None], close: Callable[[], Awaitable[None]] | None = None
) -> Result | None:
    """Awaits work, and drops it as soon as `ended` is set.

    close: is awaited before work is dropped.

    Returns work's result, or None where `ended` came first without an error. Raises work's error, or the one in `ended`.
    """
    async with beside(work) as task:
        await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if close is not None:
            await close()
        error = ended.result()
        if error is not None:
            raise error
        return None
