"""A worker: one executor, one page cache, one step loop, on which a prefill half and a decode half are mounted.

event loop       calls ─► the halves: queues, hand-offs, replies          Join: load ─► proxy, ◄─ role
step loop        both halves' chunks in one step ─► executor ─► recorded by each half
transfers        pages ◄─► the node's store, and others

Both gRPC services are served by every worker, whatever its role: the role says what the proxy is to place here, and what runs when
it changes ends where it is. Threads share the schedulers under one condition, and tell the loop what happened with life.tell.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc.aio

from ..kvstore.access import StoreAccess
from ..kvstore.client import StoreClient
from ..kvstore.transport import TransportChoice
from ..protocol.address import join_address
from ..protocol.blocks import root_key
from ..protocol.channel import create_server
from ..protocol.errors import InvalidRequest, StoreUnavailable, WorkerLost
from ..protocol.exporter import Identity, ProcessMetrics
from ..protocol.membership import REPORT_INTERVAL_S
from ..protocol.roles import ROLE_NAMES, ROLE_NUMBERS, WORKER_ROLES, WorkerRole, decodes, prefills
from ..protocol.timing.step_cost import StepCost
from ..protocol.timing.step_limits import StepLimits
from ..protocol.v1 import control_pb2
from .block_cacher import BlockCacher
from .calibration import calibrate
from .combined_scheduler import CombinedScheduler
from .executor import Executor, Progress
from .grammars import Grammars
from .page_allocator import PageAllocator
from .prefix_feed import PrefixFeed
from .prefix_loader import PrefixLoader
from .prefix_pages import PrefixPages
from .step_budget import StepBudget
from .step_loop import StepHalf, StepLoop
from .stores import Stores
from .work_front import WorkAge
from .worker_life import WorkerAddress, WorkerLife
from .worker_metrics import WorkerMetrics

logger = logging.getLogger(__name__)


class LoadExecutor(Protocol):
    def __call__(self, *, name: str, progress: Progress, on_crash: Callable[[BaseException], None]) -> Executor: ...


class HalfLoad(NamedTuple):
    """What a half has to do."""

    num_running: int
    num_waiting: int
    num_context_tokens: int  # of sequences that it decodes, or is to
    num_prefill_tokens: int  # still to compute
    steps: list[control_pb2.StepSample]


class Half(Protocol):
    """The prefill half or the decode half, on the event loop where nothing else is said."""

    scheduler: Any

    def mount(self, worker: Worker) -> StepHalf:
        """The worker has its executor and its stores now. What the half does about steps."""
        ...

    def register(self, server: grpc.aio.Server) -> None:
        """Adds its service."""
        ...

    def take_role(self, role: WorkerRole) -> None: ...

    def start_waiting(self) -> None:
        """Pages may have become free."""
        ...

    def load(self) -> HalfLoad:
        """With the lock held."""
        ...

    def store_lost(self, client: StoreClient) -> None: ...

    def fail_all(self, lost: Callable[[str], WorkerLost]) -> None:
        """lost: what a request's id fails with."""
        ...

    def leave(self) -> None:
        """The worker leaves the proxy: streams that no call owns end with their last call."""
        ...


class Worker:
    """Everything but the executor's and the step loop's calls happens on the event loop that start() runs on.

    Args:
        role: that it starts with.
        model_name: for its metrics.
        model_folder: with the tokenizer's files; read where a request brings a grammar.
        load: makes the executor, in a thread.
        keeps_prefixes: pages stay after their sequence, found by block key, until others need them.
    """

    def __init__(
        self,
        worker_address: WorkerAddress,
        *,
        role: WorkerRole,
        model_name: str,
        model_folder: Path,
        load: LoadExecutor,
        transport: TransportChoice,
        keeps_prefixes: bool = True,
        prefill: Half,
        decode: Half,
        limits: StepLimits,
    ) -> None:
        self.worker_id = worker_address.worker_id
        self.life = WorkerLife(worker_address, self._fail_all)
        self.role: WorkerRole = role
        self._model_name = model_name
        self._model_folder = model_folder
        self.prefill = prefill
        self.decode = decode
        self.changed = threading.Condition()  # guards the schedulers; notified when there may be a step
        self._halves = {"decode": decode, "prefill": prefill}  # in this order pages that became free are given
        self._limits = limits
        self._load_executor = load
        self._transport: TransportChoice = transport
        self._keeps_prefixes = keeps_prefixes

    async def start(self) -> str:
        """Loads the model, attaches to the store, listens and joins the proxy. Returns "host:port".

        It starts without a store that does not answer, and attaches to it later. Raises CheckpointError, ConfigError, SchemaMismatch.
        """
        life, worker_address = self.life, self.life.worker_address
        self.executor, self.allocator, self._step_cost = await life.load(self._load)
        facts = self.facts = self.executor.facts
        self.root = root_key(facts.schema.fingerprint)
        self.metrics = WorkerMetrics(facts.flops)
        access = StoreAccess(self.worker_id, worker_address.node_id, facts.schema, self._transport, worker_address.credentials)
        self.stores = Stores(worker_address.store_address, access, on_lost=self._store_lost, on_attached=self._store_attached)
        try:
            await self.stores.own.attach()
        except StoreUnavailable as error:
            logger.warning("%s starts without its store: %s", self.worker_id, error)
        self.prefixes = PrefixLoader(self.executor.pages, self.allocator, self.changed, self.stores, self.metrics, life.spawn)
        self.blocks = BlockCacher(self.executor.pages, self.metrics)
        self.grammars = Grammars(self._model_folder, facts.vocab_size, facts.eos_token_ids, f"{self.worker_id}-grammars")
        if facts.device != "cpu":
            await asyncio.to_thread(self.grammars.warm_up)
        self.steps = self._mount()
        self._step_age = WorkAge(self.steps.front, REPORT_INTERVAL_S)
        self._transfer_age = WorkAge(self.executor.pages.front, REPORT_INTERVAL_S)
        self.metrics.watch_engine(facts, self.allocator, self.steps.front.age_s)
        self._take_role(self.role)
        self.steps.start()
        server, port = create_server(worker_address.host, 0, credentials=worker_address.credentials)
        for half in self._halves.values():
            half.register(server)
        await server.start()
        self.address = join_address(worker_address.host, port)
        life.tend(self.stores.own.stay_attached(), "staying attached to its store")
        prefixes = self.allocator.prefixes
        feed = PrefixFeed(prefixes.changes, self.changed) if prefixes is not None else None
        served = ProcessMetrics(self.metrics.registry, self._identity)
        await life.serve(server, served, self._info(), self.load, self._obey, feed)
        return self.address

    async def serve_until_stopped(self) -> None:
        """Raises what broke the worker."""
        await self.life.stopped()

    async def stop(self, grace_s: float) -> None:
        """Leaves the proxy, gives running calls grace_s, then ends them and everything else. Idempotent."""
        for half in self._halves.values():
            half.leave()
        if not await self.life.leave(grace_s):
            return
        await asyncio.to_thread(self.steps.stop)
        await self.life.settle(grace_s)
        await self.stores.close()
        await asyncio.to_thread(self.executor.close)
        await self.grammars.close()
        await self.life.end()

    def load(self) -> control_pb2.MemberLoad:
        """As of now, for a report: ages are counted from one to the next. It waits for no step and no copy."""
        now = time.monotonic()
        step_age_s = self._step_age.look(now)
        with self.changed:
            prefill, decode = self.prefill.load(), self.decode.load()
            usage_ratio, num_cached = self.allocator.usage_ratio, self.allocator.num_cached
        num_prefill_tokens = prefill.num_prefill_tokens + decode.num_prefill_tokens
        return control_pb2.MemberLoad(
            num_running=prefill.num_running + decode.num_running,
            num_waiting=prefill.num_waiting + decode.num_waiting,
            num_outstanding_tokens=decode.num_context_tokens if decodes(self.role) else num_prefill_tokens,
            kv_usage_ratio=usage_ratio,
            num_cached_pages=num_cached,
            steps=decode.steps,
            num_prefill_tokens=num_prefill_tokens if decodes(self.role) else 0,
            step_age_s=step_age_s,
            step_expected_s=self.steps.expected_s if step_age_s else 0.0,
            transfer_age_s=self._transfer_age.look(now),
        )

    def start_waiting(self) -> None:
        """Whenever pages may have become free, or somebody came: who waits for pages gets them, who decodes first."""
        for half in self._halves.values():
            half.start_waiting()

    def _load(self) -> tuple[Executor, PageAllocator, StepCost]:
        """In a thread. The executor, its pages, and what its steps take."""
        life = self.life
        executor = self._load_executor(name=self.worker_id, progress=life.progress.report, on_crash=life.crashed)
        facts = executor.facts
        prefixes = PrefixPages(root_key(facts.schema.fingerprint), facts.page_size) if self._keeps_prefixes else None
        allocator = PageAllocator(facts.num_pages, prefixes)
        return executor, allocator, calibrate(executor, allocator, self._limits.max_tokens)

    def _mount(self) -> StepLoop:
        steps = {name: half.mount(self) for name, half in self._halves.items()}
        budget = StepBudget(self._limits, self._step_cost, self.facts.page_size, self.facts.row_counts)
        scheduler = CombinedScheduler(self.decode.scheduler, self.prefill.scheduler, budget)
        name = f"{self.worker_id}-engine"
        return StepLoop(name, self.executor, scheduler, self.changed, allocator=self.allocator, **steps, on_crash=self.life.crashed)

    def _obey(self, role: control_pb2.Role) -> None:
        """Raises InvalidRequest for what is no role of a worker."""
        for name in WORKER_ROLES:
            if ROLE_NUMBERS[name] == role:
                return self._take_role(name)
        raise InvalidRequest(f"{self.worker_id} can't take on the role {ROLE_NAMES.get(role, role)}; it takes {', '.join(WORKER_ROLES)}")

    def _take_role(self, role: WorkerRole) -> None:
        self.role = role
        for name, takes in (("prefill", prefills(role)), ("decode", decodes(role))):
            half = self._halves[name]
            if takes:
                self.metrics.watch(name, half.scheduler)
            half.take_role(role)

    def _identity(self) -> Identity:
        return Identity(self.worker_id, self.role, self._model_name)

    def _info(self) -> control_pb2.MemberInfo:
        facts = self.facts
        return control_pb2.MemberInfo(
            role=ROLE_NUMBERS[self.role],
            roles=[ROLE_NUMBERS[role] for role in WORKER_ROLES],
            address=self.address,
            store_id=self.stores.own.client.store_id if self.stores.own.is_attached else "",
            schema=facts.schema.to_proto(),
            max_model_len=min(facts.max_model_len, facts.num_pages * facts.page_size),  # a sequence has to fit alone
            kv_capacity_tokens=facts.num_pages * facts.page_size,
            device=facts.device,
            step_limits=control_pb2.StepLimits(**self._limits._asdict()),
        )

    async def _store_attached(self, client: StoreClient) -> None:
        if client.arena is not None:
            await asyncio.to_thread(self.executor.pages.pin, client.arena)

    def _store_lost(self, client: StoreClient) -> None:
        """Before the session is closed: hand-offs that came before may still be copied out of its memory."""
        if client.arena is not None:
            self.executor.pages.unpin(client.arena.memory)
        for half in self._halves.values():
            half.store_lost(client)

    def _fail_all(self, lost: Callable[[str], WorkerLost]) -> None:
        for half in self._halves.values():
            half.fail_all(lost)
