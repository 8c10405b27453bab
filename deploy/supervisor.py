"""Starts the members of a cluster, restarts those that die, and stops them in order.

start:  proxy ─► stores ─► workers        each on the node of the plan
watch:  a member's run() fails ─► a new process with the same id, the same port for proxy and stores; it rejoins by itself
        its host is gone ─► a worker moves to a host with room, or waits for one; a store ends
        it is frozen (frozen.py) ─► its process is ended, and that is a death like any other
apply:  a changed configuration ─► surplus workers stop, missing ones start, and where settings changed all restart
roll:   host by host: workers stop, the store starts anew, workers start anew; requests go on elsewhere
stop:   drain the proxy ─► workers ─► stores ─► proxy
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from ..engine.resolve import resolve_name
from ..engine.worker_life import WorkerAddress
from ..protocol.address import join_address, split_address
from ..protocol.channel import open_channel
from ..protocol.config import PORTS, ClusterConfig
from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError, HalfmoonError, InternalError, StoreUnavailable
from ..protocol.load_progress import LoadProgress
from ..protocol.roles import WorkerRole
from ..protocol.schema import KVSchema
from ..protocol.tasks import Tasks, beside
from ..protocol.v1 import control_pb2, control_pb2_grpc
from .actors import ProxyActor, StoreActor, WorkerActor, remote
from .change import Change
from .frozen import CHECK_INTERVAL_S, PROXY, Frozen
from .plan import ClusterPlan, Placed, find_room
from .ray_session import RayNode, live_nodes

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 30.0
STEADY_S = 10.0  # the backoff starts anew for a member that served this long
MAX_FIRST_STARTS = 3  # of a process that crashes before it has ever served
STOP_GRACE_S = 5.0
NODES_EVERY_S = 2.0  # Ray tells nobody of a host that joins

Notify = Callable[[str, str | LoadProgress], None]  # (member id, what happened or how far its start has come)


@dataclass(slots=True)
class Pause:
    """A member's way from a stop that was asked for to its next process."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    served: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True)
class Member:
    id: str
    actor_class: type
    node: RayNode
    arguments: Callable[[], dict[str, Any]]
    num_gpus: float = 0.0
    role: WorkerRole | None = None  # of a worker
    num_ranks: int = 0  # of a worker
    pause: Pause | None = None
    started: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )  # done at the first start, or has the error
    address: Any = None  # what its start() returned last
    actor: Any = None
    num_starts: int = 0
    is_up: bool = False  # its present process serves


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What every member of a cluster is started with."""

    asked: ClusterConfig  # as the configuration says
    config: ClusterConfig  # the same, its model's path, name and device resolved
    plan: ClusterPlan
    model_folder: Path
    schema: KVSchema
    max_model_len: int  # that the options ask for, and the model was made for


class Supervisor:
    def __init__(
        self,
        spec: ClusterSpec,
        notify: Notify = lambda member_id, event: None,
        find_nodes: Callable[[], list[RayNode]] = live_nodes,
        credentials: Credentials | None = None,
    ) -> None:
        """credentials: of the cluster. None: new ones."""
        self.credentials = credentials or Credentials.make()
        self._spec = spec
        self._notify = notify
        self._find_nodes = find_nodes
        self._members: dict[str, Member] = {}
        self._tasks = Tasks("the supervisor")
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._bug: asyncio.Future[None] | None = None  # what broke a keeper
        self._num_stores = len(spec.plan.stores)  # so far; the next one's number

    @property
    def spec(self) -> ClusterSpec:
        return self._spec

    @property
    def http_address(self) -> str:
        return self._proxy_address(0, self._spec.plan.proxy_host)

    @property
    def grpc_address(self) -> str:
        return self._proxy_address(1, self._spec.plan.proxy_host)

    @property
    def control_address(self) -> str:
        """Where members join, and operators ask."""
        return self._proxy_address(2, self._spec.plan.control_host)

    @property
    def metrics_address(self) -> str:
        return self._proxy_address(3, self._spec.plan.control_host)

    def _proxy_address(self, face: int, host: str) -> str:
        """The address at which others reach the proxy. Its own answer may be the one that stands for every address of its machine."""
        _, port = split_address(self._members["proxy"].address[face])
        return join_address(host, port)

    @property
    def members(self) -> Sequence[Member]:
        return list(self._members.values())

    async def start(self) -> None:
        """Returns when every member serves and has joined the proxy. Raises the first error that kept one from starting."""
        plan = self._spec.plan
        await self._start_all([self._proxy()])
        await self._start_all([self._store(placed) for placed in plan.stores])
        await self._start_all([self._worker(placed, role) for role, workers in plan.workers.items() for placed in workers])
        self._tasks.spawn(self._end_frozen(), "looking for frozen processes", self._broke)

    async def watch(self) -> None:
        """Runs until cancelled. Raises only a bug, because deaths are repaired."""
        await asyncio.shield(self._found_bug())

    async def apply(self, config: ClusterConfig) -> str:
        """Makes the running cluster what config says, and returns what that was in words.

        Raises ConfigError for what needs a new start (model, proxy), and for a worker that no host has room for.
        """
        change = Change.between(self._spec.asked, config, {role: self._of(role) for role in self._spec.plan.workers})
        added: list[Member] = []
        nodes = await asyncio.to_thread(self._find_nodes)
        for worker_id, role in change.missing:
            taken, needed = [*self._rank_nodes(change.surplus), *_rank_nodes(added)], config.ranks_of(role)
            found = find_room(nodes, taken, self._spec.plan.device, needed)
            if found is None:
                gpus = "a GPU and no host has one" if needed == 1 else f"{needed} GPUs and no host has as many"
                raise ConfigError(f"{worker_id} needs {gpus} free; add a host first, or ask for fewer workers")
            added.append(self._worker(Placed(worker_id, found), role))
        resolved = dataclasses.replace(config, model=self._spec.config.model)
        self._spec = dataclasses.replace(self._spec, asked=config, config=resolved)
        for worker_id in change.surplus:
            await self._remove(self._members[worker_id])
        for member in added:
            await self._have_store(member.node)
        await self._start_all(added)
        if change.restarts:
            await self.roll()
        return str(change)

    async def roll(self) -> None:
        """Gives workers and stores new processes, host by host, while the others serve. The proxy stays.

        Where only one host decodes, its workers restart one at a time and its store stays. Raises what keeps a member from starting again.
        """
        workers = [member for member in self._members.values() if member.role is not None]
        if len({member.node.node_id for member in workers if member.role != "prefill"}) < 2:
            for member in workers:
                await self._renew([member], None)
            return
        for node_id in dict.fromkeys(member.node.node_id for member in workers):
            there = [member for member in workers if member.node.node_id == node_id]
            await self._renew(there, self._store_on(there[0].node))

    async def _renew(self, workers: Sequence[Member], store: Member | None) -> None:
        paused = [*workers, *([store] if store is not None else [])]
        pauses = {member.id: Pause() for member in paused}
        try:
            for going in (workers, paused[len(workers) :]):  # a store goes when nobody uses it
                for member in going:
                    member.pause = pauses[member.id]
                await asyncio.gather(*(self._stop(member) for member in going))
            for coming in (paused[len(workers) :], workers):
                for member in coming:
                    pauses[member.id].go.set()
                await asyncio.gather(*(pauses[member.id].served for member in coming))
        finally:
            for member in paused:
                pauses[member.id].go.set()
                member.pause = None

    async def _remove(self, member: Member) -> None:
        keeper = self._keepers.pop(member.id)
        keeper.cancel()
        await asyncio.wait({keeper})
        del self._members[member.id]
        await self._stop(member)

    def _of(self, role: WorkerRole) -> list[str]:
        return [member.id for member in self._members.values() if member.role == role]

    def _rank_nodes(self, without: Sequence[str] = ()) -> list[RayNode]:
        return _rank_nodes([member for member in self._members.values() if member.id not in without])

    def _store_on(self, node: RayNode) -> Member | None:
        stores = (member for member in self._members.values() if issubclass(member.actor_class, StoreActor))
        return next((store for store in stores if store.node.node_id == node.node_id), None)

    async def _have_store(self, node: RayNode) -> None:
        """Returns when the node has one that serves."""
        store = self._store_on(node)
        if store is None:
            store = self._store(Placed(f"store-{self._num_stores}", node))
            self._num_stores += 1
            self._keep_up(store)
        await asyncio.shield(store.started)

    def _found_bug(self) -> asyncio.Future[None]:
        if self._bug is None:
            self._bug = asyncio.get_running_loop().create_future()
        return self._bug

    async def drain(self, timeout_s: float) -> int:
        """Stops admission and waits; returns how many requests were still running after timeout_s."""
        try:
            async with open_channel(self.control_address, self.credentials) as channel:
                reply = await control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest(timeout_s=timeout_s))
                return reply.num_left
        except grpc.aio.AioRpcError:
            return 0  # without a proxy there are no requests

    async def stop(self) -> None:
        """Stops workers, then stores, then the proxy. May be called in the middle of a start."""
        await self._tasks.close()
        for going in (WorkerActor, StoreActor, ProxyActor):
            await asyncio.gather(*(self._stop(member) for member in self.members if issubclass(member.actor_class, going)))

    async def _start_all(self, members: Sequence[Member]) -> None:
        if not members:
            return
        for member in members:
            self._keep_up(member)
        started = [member.started for member in members]
        done, _ = await asyncio.wait(started, return_when=asyncio.FIRST_EXCEPTION)
        for error in [future.exception() for future in done]:  # reads each, because asyncio complains of exceptions that nobody read
            if error is not None:
                raise error

    def _keep_up(self, member: Member) -> None:
        self._members[member.id] = member
        self._keepers[member.id] = self._tasks.spawn(self._keep(member), f"keeping {member.id}", self._broke)

    def _broke(self, error: Exception) -> None:
        if not (bug := self._found_bug()).done():
            bug.set_exception(error)

    async def _end_frozen(self) -> None:
        frozen = Frozen(self._spec.config.proxy)
        async with open_channel(self.control_address, self.credentials) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            while True:
                async with beside(_member_ids(stub)) as asking:
                    while not asking.done():  # a slow answer is one all the same
                        await asyncio.wait({asking}, timeout=CHECK_INTERVAL_S)
                        self._look(frozen, asking.result() if asking.done() else None)
                await asyncio.sleep(CHECK_INTERVAL_S)

    def _look(self, frozen: Frozen, members: set[str] | None) -> None:
        serving = {member.id: member.num_starts for member in self._members.values() if member.is_up}
        looked = frozen.look(time.monotonic(), serving, members)
        if looked.said:
            logger.warning("the proxy %s", looked.said)
            self._notify(PROXY, looked.said)
        for member_id in looked.frozen:
            logger.error("%s is frozen: its process is ended", member_id)
            self._notify(member_id, "frozen")
            self._kill(self._members[member_id])

    def _kill(self, member: Member) -> None:
        """Ends its process, whatever that is doing."""
        import ray

        ray.kill(member.actor, no_restart=True)

    async def _keep(self, member: Member) -> None:
        """Keeps one member alive, over as many processes as that takes."""
        from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

        backoff_s = FIRST_BACKOFF_S
        while True:
            served_since = math.inf
            if (pause := member.pause) is not None:
                await pause.go.wait()
            if member.num_starts and not await self._has_host(member):
                return
            self._notify(member.id, "starting" if member.num_starts == 0 else "starting again")
            member.num_starts += 1
            member.actor = remote(member.actor_class, node_id=member.node.node_id, num_gpus=member.num_gpus).remote(**member.arguments())
            try:
                member.address = await self._started(member)
                served_since, member.is_up = time.monotonic(), True
                self._notify(member.id, "up")
                if not member.started.done():
                    member.started.set_result(None)
                if pause is not None and not pause.served.done():
                    pause.served.set_result(None)
                await member.actor.run.remote()
                if member.pause is None:
                    return
                continue
            except (RayActorError, ActorUnschedulableError) as error:  # the second where its host is gone
                if member.pause is not None and not member.pause.go.is_set():
                    continue
                logger.info("%s died: %s", member.id, error)
                self._notify(member.id, "died")
                if not member.started.done() and member.num_starts >= MAX_FIRST_STARTS:
                    member.started.set_exception(InternalError(_crashed(member.id, member.num_starts, error)))
                    return
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, HalfmoonError) else InternalError(f"{member.id}: {error.cause!r}")
                if not member.started.done():  # it never worked: the configuration is wrong, and a restart would not help
                    member.started.set_exception(cause)
                    return
                what = "failed to start again" if served_since == math.inf else "broke while it served"
                logger.warning("%s %s: %s", member.id, what, cause)
                self._notify(member.id, f"{what}: {cause}")
                if pause is not None and not pause.served.done():
                    pause.served.set_exception(cause)
                self._kill(member)  # a process with a step that does not end does not end by itself
            finally:
                member.is_up = False
            steady = time.monotonic() - served_since > STEADY_S
            backoff_s = FIRST_BACKOFF_S if steady else min(backoff_s * 2, LONGEST_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _has_host(self, member: Member) -> bool:
        """Whether there is a host for the next process: the member's own if it lives; for a worker one with room, once there is one."""
        told = False
        while True:
            nodes = await asyncio.to_thread(self._find_nodes)
            if member.role is None:
                if any(node.node_id == member.node.node_id for node in nodes):
                    return True
                self._notify(member.id, "ended with its host")
                del self._members[member.id], self._keepers[member.id]
                if not member.started.done():
                    member.started.set_exception(StoreUnavailable(f"{member.id} lost its host before it served"))
                return False
            if all(node.node_id != member.node.node_id for node in nodes):
                found = find_room(nodes, self._rank_nodes([member.id]), self._spec.plan.device, member.num_ranks)
            else:
                found = member.node
            if found is not None:
                try:
                    await self._have_store(found)
                    member.node = found
                    return True
                except HalfmoonError as error:
                    logger.warning("%s cannot go to %s: %s", member.id, found.host, error)
            elif not told:
                self._notify(member.id, "waits for a host with room; its own is gone")
                told = True
            await asyncio.sleep(NODES_EVERY_S)

    async def _started(self, member: Member) -> Any:
        """Returns what its start() returns, and reports its progress meanwhile."""
        if not hasattr(member.actor_class, "progress"):
            return await member.actor.start.remote()
        async with beside(self._follow(member)):
            return await member.actor.start.remote()

    async def _follow(self, member: Member) -> None:
        from ray.exceptions import RayError

        seen = 0
        try:
            while (found := await member.actor.progress.remote(seen)) is not None:
                seen = found.number
                self._notify(member.id, found.progress)
        except RayError as error:  # start() fails for the same reason and reports it
            logger.debug("%s: no more progress: %s", member.id, error)

    async def _stop(self, member: Member) -> None:
        from ray.exceptions import RayError

        if member.actor is None:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(member.actor.stop.remote(STOP_GRACE_S).future()), 2 * STOP_GRACE_S)
        except (RayError, TimeoutError) as error:
            logger.warning("%s did not stop by itself (%s); killed", member.id, type(error).__name__)
        self._kill(member)
        self._notify(member.id, "stopped")

    def _proxy(self) -> Member:
        def arguments() -> dict[str, Any]:
            spec = self._spec
            config = dataclasses.replace(spec.config.proxy, control_host=spec.config.proxy.control_host or spec.plan.control_host)
            if member.address is not None:  # the same ports again, because clients and members look for it there
                ports = (split_address(address)[1] for address in member.address)
                config = dataclasses.replace(config, **dict(zip(PORTS, ports, strict=True)))
            return {
                "config": config,
                "options": spec.config.model,
                "model_folder": str(spec.model_folder),
                "schema": spec.schema,
                "credentials": self.credentials,
            }

        # declared after the closure that reads it: the addresses of its last process
        member = Member("proxy", ProxyActor, self._spec.plan.proxy, arguments)
        return member

    def _store(self, placed: Placed) -> Member:
        def arguments() -> dict[str, Any]:
            return {
                "store_id": placed.member_id,
                "node_id": placed.node.node_id,
                "host": placed.node.host,
                "port": split_address(member.address)[1] if member.address else 0,
                "proxy_address": self.control_address,
                "config": self._spec.config.store,
                "schema": self._spec.schema,
                "max_model_len": self._spec.max_model_len,
                "model_name": resolve_name(self._spec.config.model),
                "credentials": self.credentials,
            }

        member = Member(placed.member_id, StoreActor, placed.node, arguments)
        return member

    def _worker(self, placed: Placed, role: WorkerRole) -> Member:
        def arguments() -> dict[str, Any]:
            spec, node = self._spec, member.node
            store = self._store_on(node)
            assert store is not None, f"{node.host} has no store"
            return {
                "worker_address": WorkerAddress(
                    worker_id=placed.member_id,
                    node_id=node.node_id,
                    host=node.host,
                    store_address=store.address,
                    proxy_address=self.control_address,
                    credentials=self.credentials,
                ),
                "options": spec.config.model,
                "role": role,
                "prefill": spec.config.prefill,
                "decode": spec.config.decode,
            }

        num_gpus, num_ranks = 1.0 if self._spec.plan.device == "cuda" else 0.0, self._spec.config.ranks_of(role)
        member = Member(placed.member_id, WorkerActor, placed.node, arguments, num_ranks * num_gpus, role, num_ranks)
        return member


def _rank_nodes(members: Iterable[Member]) -> list[RayNode]:
    """The nodes of workers, each as often as it has ranks."""
    return [member.node for member in members for _ in range(member.num_ranks)]


async def _member_ids(control: Any) -> set[str] | None:
    """Those that the proxy knows; None where it could not be asked."""
    try:
        reply: control_pb2.MemberIdsReply = await control.MemberIds(control_pb2.MemberIdsRequest())
    except grpc.aio.AioRpcError:
        return None
    return set(reply.ids)


def _crashed(member_id: str, num_starts: int, error: Exception) -> str:
    """error: Ray's, with the traceback of the process in its text, whose last line says the most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[-1].rstrip(".") if lines else type(error).__name__
    return f"{member_id} crashed {num_starts} times before it served: {why}; the rest is in Ray's log, /tmp/ray/session_latest/logs"
