"""Work that runs beside a call, with an owner: it ends with its owner, and what breaks it is logged and acted upon.

spawn ─► runs ─► done
           ├─► an unexpected exception ─► logged with its traceback ─► on_error
           └─► close ─► grace_s, then cancelled
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """owner: for the log. Belongs to the event loop that it is used in."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(
        self, work: Coroutine[Any, Any, None], what: str, on_error: Callable[[Exception], None] = lambda _: None
    ) -> asyncio.Task[None]:
        """what: the work, for the log. on_error: what becomes of those who wait for the work; runs on the loop, once."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, what, on_error))
        return task

    async def close(self, grace_s: float = 0.0) -> None:
        """Gives the work grace_s, then cancels what is left of it. Returns when all of it has ended."""
        if grace_s > 0.0 and self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _done(self, what: str, on_error: Callable[[Exception], None], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("%s: %s failed", self._owner, what, exc_info=error)
            if isinstance(error, Exception):
                on_error(error)
