"""Work that runs beside other work, with an owner: it ends with its owner, and what breaks it is seen. Nobody else starts a task.

Tasks    spawn ─► runs ─► done                                    work that outlives the call that begins it
                    ├─► an exception ─► logged, a bug's with its traceback ─► on_error
                    └─► close ─► grace_s, then cancelled
beside   async with beside(work) as task: await task, or not      work that ends with the block at the latest
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from .errors import HalfmoonError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Tasks:
    """owner: for the log. Belongs to the event loop that it is used in."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks weakly

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(
        self, work: Coroutine[Any, Any, Result], what: str, on_error: Callable[[Exception], None] = lambda _: None
    ) -> asyncio.Task[Result]:
        """what: the work, for the log. on_error: what becomes of those who wait for the work; runs on the loop, once."""
        task = asyncio.get_running_loop().create_task(work)
        self._keep(task, partial(self._done, what, on_error))
        return task

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """As spawn, for work whose exceptions the caller takes from the task itself, by awaiting it or in a callback; see untaken."""
        task = asyncio.get_running_loop().create_task(work)
        self._keep(task, self._tasks.discard)
        return task

    async def close(self, grace_s: float = 0.0) -> None:
        """Gives the work grace_s, then cancels what is left of it. Returns when all of it has ended, but for the caller's own."""
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        if grace_s > 0.0 and tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _keep(self, task: asyncio.Task[Any], on_done: Callable[[asyncio.Task[Any]], None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(on_done)

    def _done(self, what: str, on_error: Callable[[Exception], None], task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("%s: %s failed: %s", self._owner, what, error, exc_info=None if isinstance(error, HalfmoonError) else error)
            if isinstance(error, Exception):
                on_error(error)


def untaken(task: asyncio.Task[Any]) -> None:
    """A callback for a started task whose caller may be gone when it ends: an error of ours is no news then, a bug is logged."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, HalfmoonError):
        logger.error("nobody waited for what failed: %s", error, exc_info=error)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, Result]) -> AsyncIterator[asyncio.Task[Result]]:
    """Runs work beside the block, which may await it. What of it is left at the block's end is cancelled, and has ended then.

    What it raises is the block's to take; once the block has ended, nobody wants to know.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, or asyncio complains of it
