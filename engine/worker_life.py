"""The life of a worker around its work: how it starts, what runs beside its calls, what breaks it, how it ends.

load ─► serve ─► joined ─► … ─► leave ─► settle ─► end
                             └─ broken: calls fail, the proxy is told what was computed then, and stopped() raises what broke it
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

from ..protocol.credentials import Credentials
from ..protocol.errors import MachineError, WorkerLost
from ..protocol.exporter import serve_metrics
from ..protocol.load_progress import ProgressFeed
from ..protocol.membership import PrefixFeed, stay_joined
from ..protocol.tasks import Tasks, beside
from ..protocol.v1 import control_pb2

logger = logging.getLogger(__name__)

TELL_TIMEOUT_S = 1.0  # for the proxy to take in that the worker broke
MAX_REASON_LEN = 1000

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAddress:
    """Where a worker stands. Stores that name the same node_id share their memory with it."""

    worker_id: str
    node_id: str
    host: str  # to listen on
    store_address: str  # of its node's store
    proxy_address: str  # of its control
    credentials: Credentials | None = None  # that it shows, and asks for; None: a worker without a cluster


class WorkerLife:
    """Belongs to the event loop that load() runs on, where nothing else is said.

    Args:
        fail_calls: ends every call under way, with the error that it is given for its request's id. Called when the worker breaks.
    """

    def __init__(self, worker_address: WorkerAddress, fail_calls: Callable[[Callable[[str], WorkerLost]], None]) -> None:
        self.worker_address = worker_address
        self.progress = ProgressFeed()
        self.joined = asyncio.Event()  # the proxy knows of this worker
        self._fail_calls = fail_calls
        self._working = Tasks(worker_address.worker_id)
        self._tended = Tasks(worker_address.worker_id)  # without an end of its own
        self._server: grpc.aio.Server | None = None  # from serve() to leave()
        self._membership: asyncio.Task[None] | None = None
        self._stop_metrics: Callable[[], None] = lambda: None
        self._ended = asyncio.Event()
        self._broken: BaseException | None = None
        self._suspects: frozenset[str] = frozenset()  # ids of the requests that were computed when it broke

    async def load(self, load: Callable[[], Loaded]) -> Loaded:
        """Runs load in a thread; what it reports to progress.report is there to be watched meanwhile.

        Raises MachineError where the worker breaks before that has ended. The thread may hang for ever then: in a call that waits for
        a rank which is gone. It is for the process to end.
        """
        self._loop = asyncio.get_running_loop()
        self.progress.start()
        try:
            async with beside(asyncio.to_thread(load)) as loading, beside(self._ended.wait()) as ended:
                await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
                if not loading.done():
                    raise MachineError(f"{self.worker_address.worker_id} did not start: {self._broken}")
                return loading.result()
        finally:
            self.progress.finish()

    async def serve(
        self,
        server: grpc.aio.Server,
        metrics: Collector,
        info: control_pb2.MemberInfo,
        load: Callable[[], control_pb2.MemberLoad],
        take_role: Callable[[control_pb2.Role], None],
        prefixes: PrefixFeed | None = None,
    ) -> None:
        """Serves metrics and joins the proxy.

        Args:
            info: roles, address, store_id and what the executor says of itself.
            take_role, prefixes: as stay_joined's.
        """
        self._server = server
        worker_address = self.worker_address
        metrics_address, self._stop_metrics = serve_metrics(metrics, worker_address.host, credentials=worker_address.credentials)
        ours = control_pb2.MemberInfo(
            id=worker_address.worker_id,
            incarnation=uuid.uuid4().hex,
            metrics_address=metrics_address,
            node_id=worker_address.node_id,
            store_address=worker_address.store_address,
            pid=os.getpid(),
        )
        ours.MergeFrom(info)
        self._told: asyncio.Future[control_pb2.Broken] = self._loop.create_future()
        joining = stay_joined(
            worker_address.proxy_address,
            ours,
            load,
            self.joined.set,
            take_role,
            self._told,
            prefixes,
            credentials=worker_address.credentials,
        )
        self._membership = self._tended.spawn(joining, "its membership", self._break)
        logger.info("%s serves on %s", worker_address.worker_id, info.address)

    async def stopped(self) -> None:
        """Until it is. Raises what broke the worker, once the proxy knows."""
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
        await self._working.close(grace_s)
        await self._tended.close()

    async def until_joined(self) -> None:
        """Until the proxy knows of this worker. Raises what broke it before that: a refusal, say."""
        async with beside(self.joined.wait()) as joined, beside(self.stopped()) as stopped:
            await asyncio.wait((joined, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                await stopped

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

    def crashed(self, error: BaseException, suspects: frozenset[str] = frozenset()) -> None:
        """Any thread: the worker is broken. suspects: ids of the requests that were computed then."""
        self.tell(partial(self._break, error, suspects))

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Runs beside the calls; what it raises breaks the worker. what: the work, for the log."""
        return self._working.spawn(work, what, self._break)

    def tend(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """As spawn, for what lasts until the worker ends."""
        self._tended.spawn(work, what, self._break)

    def _break(self, error: BaseException, suspects: frozenset[str] = frozenset()) -> None:
        if self._broken is None:
            self._broken, self._suspects = error, suspects
            self._fail_calls(partial(self._lost, error))
            self._leave_broken()

    def _leave_broken(self) -> None:
        if self._membership is None or self._membership.done():
            self._ended.set()
            return
        self._membership.add_done_callback(lambda _: self._ended.set())
        self._told.set_result(control_pb2.Broken(reason=str(self._broken)[:MAX_REASON_LEN], request_ids=sorted(self._suspects)))
        self._loop.call_later(TELL_TIMEOUT_S, self._membership.cancel)  # the proxy may be gone, too

    def _lost(self, error: BaseException, request_id: str = "") -> WorkerLost:
        worker_id = self.worker_address.worker_id
        return WorkerLost(f"worker {worker_id} broke: {error}", worker=worker_id, in_step=request_id in self._suspects)
