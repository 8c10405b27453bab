"""How far a worker's start has come, from the thread that loads the model to whoever wants to watch.

loading thread: report ─► latest ─► next(): the next one for those who have seen the last      finish ─► next(): None

Who reads slowly sees fewer of them, never old ones: nothing is queued.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class LoadProgress(NamedTuple):
    stage: str  # "loading weights", "compiling kernels", …
    done: int
    total: int  # bytes of weights; kernels, graphs


class Numbered(NamedTuple):
    number: int  # 1 for the first
    progress: LoadProgress


class ProgressFeed:
    """Belongs to the event loop that start() was called on; report is for one other thread."""

    def __init__(self) -> None:
        self._latest: Numbered | None = None
        self._finished = False
        self._changed = asyncio.Event()  # replaced by a new one at every change
        self._told: tuple[str, int] | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def report(self, stage: str, done: int, total: int) -> None:
        """The engine calls it at every tensor; it is passed on once for each whole percent."""
        percent = 100 * done // max(total, 1)
        if (stage, percent) != self._told:
            self._told = stage, percent
            self._loop.call_soon_threadsafe(self._set, LoadProgress(stage, done, total))

    def finish(self) -> None:
        """The start is over, well or not."""
        self._finished = True
        self._wake()

    async def next(self, seen: int) -> Numbered | None:
        """The latest one, as soon as its number is above seen; None once the start is over. May be awaited before start()."""
        while not self._finished:
            if self._latest is not None and self._latest.number > seen:
                return self._latest
            await self._changed.wait()
        return None

    def _set(self, progress: LoadProgress) -> None:
        self._latest = Numbered(self._latest.number + 1 if self._latest else 1, progress)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
