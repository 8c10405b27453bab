"""What Ray places: a prefill worker in an actor's process. deploy wraps it with ray.remote, so nothing here needs Ray."""

from __future__ import annotations

from typing import Any

from ..protocol.load_progress import Numbered
from .worker import PrefillWorker


class PrefillActor:
    """kwargs: PrefillWorker's."""

    def __init__(self, **kwargs: Any) -> None:
        self._worker = PrefillWorker(**kwargs)
        self._life = self._worker.life

    async def start(self) -> str:
        """The gRPC address, once requests are taken and the proxy sends some."""
        address = await self._worker.start()
        await self._life.joined.wait()
        return address

    async def progress(self, seen: int) -> Numbered | None:
        """How far start() has come, as soon as that is news to who has seen number `seen`; None once it is over."""
        return await self._life.progress.next(seen)

    async def run(self) -> None:
        """Returns when stopped; raises what broke the worker."""
        await self._worker.serve_until_stopped()

    async def stop(self, grace_s: float) -> None:
        await self._worker.stop(grace_s)
