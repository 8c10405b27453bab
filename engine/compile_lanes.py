"""Threads for work that may take for ever and can't be stopped: each piece has a limit, after which nobody waits for it any more.

run(work) ─► a lane is free ─► a thread of its own ─► result
                                 └─ limit_s ─► LateError; its thread goes on alone, and its lane is free for others
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ..protocol.errors import Overloaded

LIMIT_S = 10.0
NUM_LANES = 2
MAX_LATE = 4
_NICENESS = 10
"""Of the threads: steps come first."""

Result = TypeVar("Result")


class LateError(Exception):
    """The work takes longer than its limit."""


class CompileLanes:
    """Belongs to one event loop. The threads are daemons, so that no process waits for one that is late."""

    def __init__(self, name: str, limit_s: float = LIMIT_S) -> None:
        self._name = name
        self._limit_s = limit_s
        self._free = asyncio.Semaphore(NUM_LANES)
        self._num_late = 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """Raises what the work raises, LateError, and Overloaded while as many threads as there may be are late."""
        async with self._free:
            if self._num_late >= MAX_LATE:
                raise Overloaded(
                    f"{self._num_late} grammars that take long to compile hold all threads; try again later", retry_after_s=self._limit_s
                )
            done = self._begin(work)
            await asyncio.wait([done], timeout=self._limit_s)
            if done.done():
                return done.result()
        self._num_late += 1
        done.add_done_callback(self._ended_late)
        raise LateError

    def _begin(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            try:
                result = work()
            except Exception as error:  # whatever it is, it belongs to those who wait
                _told(loop, partial(done.set_exception, error))
            else:
                _told(loop, partial(done.set_result, result))

        threading.Thread(target=run, name=self._name, daemon=True).start()
        return done

    def _ended_late(self, done: asyncio.Future[Result]) -> None:
        self._num_late -= 1
        done.exception()  # looked at: nobody waits for it


def _told(loop: asyncio.AbstractEventLoop, tell: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(tell)
