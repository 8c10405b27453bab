"""Copies KV between pages and a store's memory, beside the engine's thread and the event loop, in the order of the calls.

event loop, engine thread ──submit──► transfer thread: calls, which give the device copies to do    (on CUDA: a stream of its own)
                                            │ up to MAX_UNDER_WAY calls' copies at a time
                                            ▼
                                      landing thread: each call's copies are over ─► the rest of the call's work on the bytes

On a CPU the copies are over when the call returns, and one thread does both.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

Landing = Callable[[], None]  # called once the copies are over
Call = Callable[[], Landing | None]

MAX_UNDER_WAY = 3  # one is being copied, the one before it hashed, and the one after it waits for the device


class Issued(NamedTuple):
    copied: torch.cuda.Event
    landing: Landing | None


class TransferThread:
    """Submitted calls run in order and land in order.

    Args:
        on_crash: gets, on one of the threads, what a call or its landing raised. Calls handle the errors that they expect themselves.
    """

    def __init__(self, name: str, device: torch.device, on_crash: Callable[[BaseException], None]) -> None:
        self._issuing = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._landing = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-landing")
        # its kernels are short and a copy waits for each, so they go before those of a step
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._under_way = threading.Semaphore(MAX_UNDER_WAY)
        self._starting = threading.Lock()  # so that both threads get the calls in the same order
        self._on_crash = on_crash

    def event(self) -> torch.cuda.Event | None:
        """An event after all work that the calling thread has given the device so far. None if nothing is asynchronous."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def submit(self, call: Call, *, after: torch.cuda.Event | None = None) -> None:
        """Never waits. after: on the device the call's copies come after this event."""
        self.start(call, after).add_done_callback(self._check)

    def start(self, call: Call, after: torch.cuda.Event | None = None) -> Future[None]:
        """As submit, but errors go to the future. It is done when the call has landed, and must not be cancelled."""
        if self._stream is None:
            return self._issuing.submit(_call, call)
        with self._starting:
            issued = self._issuing.submit(self._issue, self._stream, call, after)
            return self._landing.submit(self._land, issued)

    async def run(self, call: Call) -> None:
        """As start, and waits. Cancelling the wait does not stop the call."""
        await asyncio.shield(asyncio.wrap_future(self.start(call)))

    async def drained(self) -> None:
        """Waits until everything submitted so far has landed."""
        await self.run(lambda: None)

    def close(self) -> None:
        """Waits for everything that was submitted."""
        self._issuing.shutdown()
        self._landing.shutdown()

    def _issue(self, stream: torch.cuda.Stream, call: Call, after: torch.cuda.Event | None) -> Issued:
        self._under_way.acquire()  # released when it has landed
        copied = torch.cuda.Event(blocking=True)  # a spinning thread would take a core from the checksums
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            landing = call()
            copied.record(stream)
        return Issued(copied, landing)

    def _land(self, issued: Future[Issued]) -> None:
        try:
            copied, landing = issued.result()
            copied.synchronize()
            if landing is not None:
                landing()
        finally:
            self._under_way.release()

    def _check(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._on_crash(error)


def _call(call: Call) -> None:
    landing = call()
    if landing is not None:
        landing()
