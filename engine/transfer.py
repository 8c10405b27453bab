"""One thread that carries KV between pages and a store's memory, beside the engine's thread and the event loop.

event loop, engine thread ──submit──► [first in, first out] ──► transfer thread (on CUDA: a stream of its own)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class TransferThread:
    """What is submitted runs in order, each call complete (its copies too) before the next begins.

    Args:
        on_crash: told, on this thread, what a submitted call raised; such a call handles the errors it expects itself.
    """

    def __init__(self, name: str, device: torch.device, on_crash: Callable[[BaseException], None]) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_crash = on_crash

    def event(self) -> torch.cuda.Event | None:
        """Marks what the calling thread has given the device so far; None where nothing is asynchronous."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    def submit(self, call: Callable[[], None], *, after: torch.cuda.Event | None = None) -> None:
        """Never waits. after: on the device, the call's copies come after this event."""
        self._executor.submit(self._run, call, after).add_done_callback(self._check)

    async def run(self, call: Callable[[], Result]) -> Result:
        """As submit, and waits for the result. Cancelling the wait does not stop a call that has begun."""
        return await asyncio.wrap_future(self._executor.submit(self._run, call, None))

    async def drained(self) -> None:
        """Until everything submitted so far is over."""
        await self.run(lambda: None)

    def close(self) -> None:
        """Waits for what was submitted."""
        self._executor.shutdown()

    def _run(self, call: Callable[[], Result], after: torch.cuda.Event | None) -> Result:
        if self._stream is None:
            return call()
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            result = call()
            self._stream.synchronize()
            return result

    def _check(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._on_crash(error)
