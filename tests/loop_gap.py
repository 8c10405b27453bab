"""How long an event loop stands still while something else happens, and how often it turns."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

BEAT_S = 0.001


@dataclass
class LoopGap:
    """In CPU time of this process: what other processes take from the machine is not in it, work under the interpreter's lock is."""

    longest_s: float = 0.0


@contextlib.contextmanager
def loop_gap(loop: asyncio.AbstractEventLoop) -> Iterator[LoopGap]:
    """The longest stretch between two turns of the loop, which may run in this thread or another.

    Compare it with the CPU time that the same work takes by itself: on a slow machine both grow. A scheduler that leaves the loop's
    thread waiting looks like a gap, so take the least of a few runs; work that holds the loop up does so in each. The garbage collector
    is off meanwhile: a full run goes through all that the tests have imported, which a proxy has taken out of its sight.
    """
    gap, last, over = LoopGap(), time.process_time(), False

    def beat() -> None:
        nonlocal last
        now = time.process_time()
        gap.longest_s, last = max(gap.longest_s, now - last), now
        if not over:
            loop.call_later(BEAT_S, beat)

    def end(done: concurrent.futures.Future[None]) -> None:
        nonlocal over
        over = True
        beat()
        done.set_result(None)

    loop.call_soon_threadsafe(beat)
    gc.disable()
    try:
        yield gap
    finally:
        gc.enable()
    done: concurrent.futures.Future[None] = concurrent.futures.Future()
    if asyncio._get_running_loop() is loop:
        end(done)
    else:
        loop.call_soon_threadsafe(end, done)
    done.result(30)


class LoopTurns:
    num = 0


@contextlib.asynccontextmanager
async def counted_turns() -> AsyncIterator[LoopTurns]:
    """How often the event loop serves others meanwhile."""
    turns = LoopTurns()

    async def others() -> None:
        while True:
            turns.num += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    try:
        yield turns
    finally:
        beside.cancel()
