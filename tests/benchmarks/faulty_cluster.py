"""A live cluster on this machine whose processes can be hurt, and looked at from outside.

FaultyWorker.wedge   a step that does not end      FaultyStore.wedge, FaultyProxy.wedge   an event loop that stands still
FaultyProxy.set_role   a worker's role
LiveCluster          kill, stop, wedge by member id · who has joined · what is held at rest · descriptors, memory, tracebacks
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio

from halfmoon.client import AsyncClient
from halfmoon.deploy.actors import ProxyActor, StoreActor, WorkerActor
from halfmoon.deploy.cluster import make_spec
from halfmoon.deploy.plan import Placed
from halfmoon.deploy.ray_session import ray_session
from halfmoon.deploy.supervisor import Member, Supervisor
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import PORTS, ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.roles import ROLE_NUMBERS, WorkerRole
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc

STATUS_TIMEOUT_S = 1.0
ORDER_TIMEOUT_S = 10.0
STEP_WITHIN_S = 10.0  # while there is load
ANSWER_S = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
NUM_MEMBERS = 5


def wedge_loop(seconds: float) -> None:
    """Has the running loop stand still for so long, once the caller's answer is sent."""
    asyncio.get_running_loop().call_later(ANSWER_S, time.sleep, seconds)


class FaultyWorker(WorkerActor):
    async def wedge(self, seconds: float) -> None:
        """Returns once a step has begun that ends that much later."""
        executor: Any = self._worker.executor
        launch, begun = executor.launch, threading.Event()

        def wedged(*arguments: Any) -> Any:
            executor.launch = launch
            begun.set()
            time.sleep(seconds)
            return launch(*arguments)

        executor.launch = wedged
        await asyncio.to_thread(begun.wait)


class FaultyStore(StoreActor):
    async def wedge(self, seconds: float) -> None:
        wedge_loop(seconds)


class FaultyProxy(ProxyActor):
    async def wedge(self, seconds: float) -> None:
        wedge_loop(seconds)

    async def pid(self) -> int:
        return os.getpid()

    async def set_role(self, worker_id: str, role: WorkerRole) -> None:
        cluster = self._server.cluster
        await cluster.set_role(cluster.members[worker_id], role, ORDER_TIMEOUT_S)


class FaultySupervisor(Supervisor):
    def _proxy(self) -> Member:
        member = super()._proxy()
        member.actor_class = FaultyProxy
        return member

    def _store(self, placed: Placed) -> Member:
        member = super()._store(placed)
        member.actor_class = FaultyStore
        return member

    def _worker(self, placed: Placed, role: WorkerRole) -> Member:
        member = super()._worker(placed, role)
        member.actor_class = FaultyWorker
        return member


class Process(NamedTuple):
    """What one process holds."""

    pid: int
    num_fds: int
    rss_mib: float


def configuration(**proxy: Any) -> ClusterConfig:
    """Two prefill and two decode workers, one store, whose arena holds a few long prompts."""
    return ClusterConfig(
        store=StoreConfig(arena_bytes=64 * 2**20),
        proxy=ProxyConfig(**dict.fromkeys(PORTS, 0), **proxy),
        prefill=PrefillConfig(num_workers=2, max_tokens_per_step=128),
        decode=DecodeConfig(num_workers=2),
    )


@asynccontextmanager
async def live_cluster(
    config: ClusterConfig, notify: Callable[[str, str], None] = lambda member_id, event: None
) -> AsyncIterator[LiveCluster]:
    with ray_session() as nodes:
        import ray.cloudpickle
        from ray._private import worker

        session: Any = worker._global_node

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a member's process can't import a benchmark
        supervisor = FaultySupervisor(
            make_spec(config, nodes), lambda member_id, event: notify(member_id, event) if isinstance(event, str) else None
        )
        try:
            await supervisor.start()
            async with open_channel(supervisor.control_address, supervisor.credentials) as channel:
                yield LiveCluster(supervisor, channel, Path(session.get_logs_dir_path()))
        finally:
            await supervisor.stop()


class LiveCluster:
    def __init__(self, supervisor: Supervisor, control: grpc.aio.Channel, logs: Path) -> None:
        self.supervisor = supervisor
        self._control: Any = control_pb2_grpc.ControlStub(control)
        self._logs = logs

    def client(self) -> AsyncClient:
        return AsyncClient(self.supervisor.grpc_address)

    # who is there

    async def status(self) -> control_pb2.StatusReply | None:
        """None where the proxy does not answer."""
        try:
            return await self._control.Status(control_pb2.StatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None

    async def incarnations(self) -> dict[str, str]:
        """Of the members that the proxy knows."""
        status = await self.status()
        return {member.info.id: member.info.incarnation for member in status.members} if status is not None else {}

    async def until(self, holds: Callable[[dict[str, str]], bool], within_s: float, every_s: float = 0.05) -> float | None:
        """Seconds until the members are so; None where they were not within the time."""
        began = time.monotonic()
        while not holds(await self.incarnations()):
            if time.monotonic() - began > within_s:
                return None
            await asyncio.sleep(every_s)
        return time.monotonic() - began

    async def all_back(self, within_s: float) -> float | None:
        return await self.until(lambda members: len(members) == NUM_MEMBERS, within_s)

    async def pid(self, member_id: str) -> int:
        """Raises LookupError where it is not there now."""
        if member_id == "proxy":
            return await self._actor("proxy").pid.remote()
        status = await self.status()
        found = [member.info.pid for member in status.members if member.info.id == member_id] if status is not None else []
        if not found:
            raise LookupError(f"{member_id} is not there")
        return found[0]

    # faults

    async def kill(self, member_id: str) -> None:
        os.kill(await self.pid(member_id), signal.SIGKILL)

    @asynccontextmanager
    async def stopped(self, member_id: str) -> AsyncIterator[None]:
        pid = await self.pid(member_id)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def wedge(self, member_id: str, seconds: float) -> None:
        """Raises LookupError where the process ends, or the worker has no step to do."""
        from ray.exceptions import RayError

        try:
            await asyncio.wait_for(asyncio.wrap_future(self._actor(member_id).wedge.remote(seconds).future()), STEP_WITHIN_S)
        except (RayError, TimeoutError) as error:
            raise LookupError(f"{member_id} had no step to wedge: {error}") from error

    async def set_role(self, worker_id: str, role: WorkerRole) -> None:
        """Raises LookupError where it is not there, or does not confirm it."""
        from ray.exceptions import RayError

        try:
            await self._actor("proxy").set_role.remote(worker_id, role)
        except RayError as error:
            raise LookupError(f"{worker_id} does not take on the role {role}: {error}") from error

    async def role_is(self, worker_id: str, role: WorkerRole, within_s: float) -> None:
        """Gives a worker its role again, unless a new process of it has it. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                status = await self.status()
                if status is not None and any(one.info.id == worker_id and one.role == ROLE_NUMBERS[role] for one in status.members):
                    return
                with contextlib.suppress(LookupError):
                    await self.set_role(worker_id, role)
                await asyncio.sleep(0.1)

    def _actor(self, member_id: str) -> Any:
        return next(member.actor for member in self.supervisor.members if member.id == member_id)

    # what is held

    async def not_at_rest(self) -> str:
        """Leases, hand-offs, bytes, pages or requests that are still there; "" where there are none."""
        status = await self.status()
        if status is None:
            return "the proxy does not answer"
        for member in status.members:
            load = member.load
            if member.info.role == control_pb2.ROLE_STORE:
                found = await self._stats(member.info.address)
                if found is None:
                    return f"{member.info.id} does not answer"
                total = found.num_bytes_leased + found.num_bytes_cached + found.num_bytes_free
                if total != found.num_bytes_arena or found.num_leases or found.num_handoffs or found.num_bytes_leased:
                    held = f"{found.num_leases} leases, {found.num_handoffs} hand-offs, {found.num_bytes_leased} bytes leased"
                    return f"{member.info.id}: {held}, {total} of {found.num_bytes_arena} bytes in its books"
            elif load.num_running or load.num_waiting or load.kv_usage_ratio:
                at_work = f"{load.num_running} running, {load.num_waiting} waiting"
                return f"{member.info.id}: {at_work}, {load.kv_usage_ratio:.4f} of its pages"
        if status.num_queued or status.num_running:
            return f"the proxy: {status.num_queued} queued, {status.num_running} running"
        return ""

    async def num_handoffs(self) -> int:
        status = await self.status()
        stores = (
            [member.info.address for member in status.members if member.info.role == control_pb2.ROLE_STORE] if status is not None else []
        )
        return sum([found.num_handoffs for address in stores if (found := await self._stats(address)) is not None])

    async def _stats(self, address: str) -> kvstore_pb2.StatsReply | None:
        """None where the store does not answer."""
        async with open_channel(address, self.supervisor.credentials) as channel:
            try:
                return await kvstore_pb2_grpc.KVStoreStub(channel).Stats(kvstore_pb2.StatsRequest(), timeout=STATUS_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return None

    async def processes(self) -> dict[str, Process]:
        found: dict[str, Process] = {}
        for member in self.supervisor.members:
            with contextlib.suppress(LookupError, OSError):
                pid = await self.pid(member.id)
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[member.id] = Process(pid, len(os.listdir(f"/proc/{pid}/fd")), round(pages * PAGE_BYTES / 2**20, 1))
        return found

    def tracebacks(self) -> Counter[str]:
        """The last line of each in the members' logs, and of what asyncio says of tasks that nobody asked."""
        found: Counter[str] = Counter()
        for path in self._logs.glob("worker-*.err"):
            found.update(last_lines(path.read_text(errors="replace").splitlines()))
        return found


def last_lines(lines: Sequence[str]) -> list[str]:
    """Of each traceback: what was raised."""
    found, inside = [], False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line[0].isspace():
            found.append(re.sub(r"\d{4,}|[0-9a-f]{12,}", "#", line)[:300])
            inside = False
    return found
