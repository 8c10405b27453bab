"""One run of a list of requests. Each is sent when it is due, whatever has become of those before it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .balancer import Balancer
from .client_lag import LagMeter
from .plan import LoadRequest
from .sample import Sample
from .sender import Sender

AHEAD_S = 0.2  # between the moment when all bodies are ready and the first request


@dataclass(slots=True)
class Progress:
    """What a window has seen so far."""

    num_requests: int
    num_sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_ended(self) -> int:
        return self.outcomes.total()

    @property
    def num_running(self) -> int:
        return self.num_sent - self.num_ended


@dataclass(slots=True)
class Window:
    samples: list[Sample]  # by due time
    lag: LagMeter


async def run_window(
    requests: Sequence[LoadRequest], sender: Sender, balancer: Balancer, notify: Callable[[Progress], None] = lambda progress: None
) -> Window:
    """Returns when the last request has ended.

    Args:
        requests: by due time.
        notify: after every request that was sent or ended.
    """
    bodies = [sender.body(request) for request in requests]
    progress = Progress(len(requests))
    lag = LagMeter()
    with _frozen_heap():
        async with lag.measuring():
            start = time.perf_counter() + AHEAD_S
            async with asyncio.TaskGroup() as tasks:
                running: list[asyncio.Task[Sample]] = []
                for request, body in zip(requests, bodies, strict=True):
                    wait_s = start + request.due_s - time.perf_counter()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    progress.num_sent += 1
                    running.append(tasks.create_task(_one(request, body, sender, balancer, start, progress, notify)))
                    notify(progress)
    return Window([task.result() for task in running], lag)


async def _one(
    request: LoadRequest, body: bytes, sender: Sender, balancer: Balancer, start: float, progress: Progress,
    notify: Callable[[Progress], None],
) -> Sample:  # fmt: skip
    endpoint = balancer.pick(request)
    try:
        sample = await sender.send(request, body, endpoint, max(0.0, time.perf_counter() - start - request.due_s))
    finally:
        balancer.ended(request, endpoint)
    progress.outcomes[sample.outcome] += 1
    notify(progress)
    return sample


@contextmanager
def _frozen_heap() -> Generator[None, None, None]:
    """Keeps existing objects out of garbage collections. Walking them takes tens of milliseconds, in which nothing is read."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
