"""The life of a worker around its work: how it starts, what runs beside its calls, what breaks it, how it ends.

load ─► serve ─► joined ─► … ─► leave ─► settle ─► end
                             └─ broken, by what no request caused: it leaves the proxy, and stopped() raises what broke it
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc.aio
from prometheus_client.registry import Collector

from ..protocol.errors import WorkerLost
from ..protocol.exporter import serve_metrics
from ..protocol.load_progress import ProgressFeed
from ..protocol.membership import stay_joined
from ..protocol.v1 import control_pb2

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAddress:
    """Where a worker stands. Stores that name the same node_id share their memory with it."""

    worker_id: str
    node_id: str
    host: str  # to listen on
    store_address: str  # of its node's store
    proxy_address: str


class WorkerLife:
    """Belongs to the event loop that load() runs on, where nothing else is said.

    Args:
        fail_calls: ends every call under way with the error that it is given. Called when the worker breaks.
    """

    def __init__(self, worker_address: WorkerAddress, fail_calls: Callable[[WorkerLost], None]) -> None:
        self.worker_address = worker_address
        self.progress = ProgressFeed()
        self.joined = asyncio.Event()  # the proxy knows of this worker
        self._fail_calls = fail_calls
        self._background: set[asyncio.Task[None]] = set()
        self._tended: set[asyncio.Task[None]] = set()  # of those, the ones without an end of their own
        self._server: grpc.aio.Server | None = None  # from serve() to leave()
        self._membership: asyncio.Task[None] | None = None
        self._stop_metrics: Callable[[], None] = lambda: None
        self._ended = asyncio.Event()
        self._broken: BaseException | None = None

    async def load(self, load: Callable[[], Loaded]) -> Loaded:
        """Runs load in a thread; what it reports to progress.report is there to be watched meanwhile."""
        self._loop = asyncio.get_running_loop()
        self.progress.start()
        try:
            return await asyncio.to_thread(load)
        finally:
            self.progress.finish()

    async def serve(
        self,
        server: grpc.aio.Server,
        metrics: Collector,
        info: control_pb2.MemberInfo,
        load: Callable[[], control_pb2.MemberLoad],
        take_role: Callable[[control_pb2.Role], None],
    ) -> None:
        """Serves metrics and joins the proxy.

        Args:
            info: roles, address, store_id and what the executor says of itself.
            take_role: as stay_joined's.
        """
        self._server = server
        worker_address = self.worker_address
        metrics_address, self._stop_metrics = serve_metrics(metrics, worker_address.host)
        ours = control_pb2.MemberInfo(
            id=worker_address.worker_id,
            incarnation=uuid.uuid4().hex,
            metrics_address=metrics_address,
            node_id=worker_address.node_id,
            store_address=worker_address.store_address,
            pid=os.getpid(),
        )
        ours.MergeFrom(info)
        self._membership = asyncio.create_task(stay_joined(worker_address.proxy_address, ours, load, self.joined.set, take_role))
        logger.info("%s serves on %s", worker_address.worker_id, info.address)

    async def stopped(self) -> None:
        """Until it is. Raises what broke the worker."""
        await self._ended.wait()
        if self._broken is not None:
            raise self._broken

    async def leave(self, grace_s: float) -> bool:
        """Leaves the proxy and gives running calls grace_s. False where it had left already, or never served."""
        server, self._server = self._server, None
        if server is None or self._membership is None:
            return False
        self._membership.cancel()
        await server.stop(grace_s)
        return True

    async def settle(self, grace_s: float) -> None:
        """Gives background work grace_s, leases being released say, then ends it and all that tend() was given."""
        if working := self._background - self._tended:
            await asyncio.wait(working, timeout=grace_s)
        tasks = [*self._background, *([self._membership] if self._membership else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def end(self) -> None:
        await asyncio.to_thread(self._stop_metrics)
        self._ended.set()

    def require_sound(self) -> None:
        """Raises WorkerLost once something has broken the worker."""
        if self._broken is not None:
            raise self._lost(self._broken)

    def tell(self, call: Callable[[], None]) -> None:
        """Any thread: call runs on the event loop."""
        self._loop.call_soon_threadsafe(call)

    def crashed(self, error: BaseException) -> None:
        """Any thread: something is wrong that no request caused."""
        self.tell(partial(self._break, error))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs beside the calls; what it raises breaks the worker."""
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def tend(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """As spawn, for what lasts until the worker ends."""
        self._tended.add(self.spawn(coroutine))

    def _break(self, error: BaseException) -> None:
        if self._broken is None:
            self._broken = error
            self._ended.set()
            if self._membership is not None:
                self._membership.cancel()
        self._fail_calls(self._lost(error))

    def _lost(self, error: BaseException) -> WorkerLost:
        worker_id = self.worker_address.worker_id
        return WorkerLost(f"worker {worker_id} broke: {error}", worker_id=worker_id)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("%s: background work failed", self.worker_address.worker_id, exc_info=error)
            self._break(error)
