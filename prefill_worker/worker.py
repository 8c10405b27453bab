"""The prefill worker: a queue of prompts, an engine on a thread of its own, and the stores it reads from and pushes to.

event loop       Prefill ─► add ─► start ─► reserve, load prefix ─► ready ┐           ┌─► seal ─► reply
engine thread                                        schedule ─► forward ─► record    │   sleeps when there is nothing to do
transfer thread                                   copies prefixes in, pushes layers ──┘

Threads share the scheduler under one condition, and tell the loop what happened with call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from ..engine.arena_pins import ArenaPins
from ..engine.engine import Engine
from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..engine.transfer import TransferThread
from ..kvstore.client import StoreClient
from ..protocol.blocks import div_ceil, root_key, sent_or_made_keys
from ..protocol.config import ModelOptions, PrefillConfig
from ..protocol.errors import HalfmoonError, HandoffCorrupt, InternalError, RequestCancelled, StoreUnavailable, WorkerLost
from ..protocol.v1 import common_pb2, control_pb2, worker_pb2
from ..protocol.worker_life import WorkerAddress, WorkerLife
from .fault import flip_pushed_bytes
from .job import PrefillJob, check_sequence
from .loader import PrefixLoader
from .metrics import PrefillMetrics
from .pusher import BlockPusher
from .scheduler import PrefillScheduler
from .service import start_server
from .steps import PrefillSteps
from .stores import Stores

logger = logging.getLogger(__name__)


class PrefillWorker:
    """Everything but the engine's and the transfer thread's calls happens on the event loop that start() runs on.

    Args:
        flip_pushed_bytes: a fault for tests: bytes are altered on their way to the store.
    """

    def __init__(
        self, worker_address: WorkerAddress, *, options: ModelOptions, config: PrefillConfig, flip_pushed_bytes: bool = False
    ) -> None:
        self.worker_id = worker_address.worker_id
        self.life = WorkerLife(worker_address, self._fail_all)
        self._options = options
        self._config = config
        self._flip_pushed_bytes = flip_pushed_bytes
        self._jobs: dict[Sequence, PrefillJob] = {}

    async def start(self) -> str:
        """Loads the model, attaches to the store, listens and joins the proxy. Returns "host:port".

        Raises CheckpointError, ConfigError, StoreUnavailable, SchemaMismatch.
        """
        life, worker_address = self.life, self.life.worker_address
        self.engine = await life.load(self._load_engine)
        cache = self.engine.cache
        self.scheduler = PrefillScheduler(PageAllocator(cache.num_pages), cache.page_size, self._config.max_tokens_per_step)
        self.metrics = PrefillMetrics(self.scheduler)
        self._root = root_key(self.engine.schema.fingerprint)
        self._transfer = TransferThread(f"{self.worker_id}-transfer", self.engine.device, life.crashed)
        self._pins = ArenaPins(cache, self._transfer)
        self.stores = Stores(
            worker_address.store_address,
            client_id=self.worker_id,
            node_id=worker_address.node_id,
            schema=self.engine.schema,
            transport=self._config.transport,
            on_lost=self._store_lost,
            on_attached=self._pins.attached,
        )
        await self.stores.own.attach()
        self._loader = PrefixLoader(cache, self.stores, self._transfer, self.metrics, life.spawn)
        self._pusher = BlockPusher(cache, self._transfer, self.metrics)
        self._steps = PrefillSteps(self.engine, self.scheduler, self._jobs, self._pusher, life, self._stepped)
        self._changed = self._steps.changed  # guards the scheduler
        self._steps.start()
        server, self.address = await start_server(self, worker_address.host)
        life.tend(self.stores.own.stay_attached())
        await life.serve(server, self.metrics.registry, self._info(), self.load)
        return self.address

    async def serve_until_stopped(self) -> None:
        """Raises what broke the worker."""
        await self.life.stopped()

    async def stop(self, grace_s: float) -> None:
        """Leaves the proxy, gives running calls grace_s, then ends them and everything else. Idempotent."""
        if not await self.life.leave(grace_s):
            return
        await asyncio.to_thread(self._steps.stop)
        await self.life.settle(grace_s)
        await self.stores.close()
        await asyncio.to_thread(self._transfer.close)
        await self._pins.close()
        await self.life.end()

    def load(self) -> control_pb2.MemberLoad:
        with self._changed:
            return control_pb2.MemberLoad(
                num_running=self.scheduler.num_running,
                num_waiting=self.scheduler.num_waiting,
                num_outstanding_tokens=self.scheduler.num_outstanding_tokens,
                kv_usage_ratio=self.scheduler.allocator.usage_ratio,
            )

    async def prefill(self, request: worker_pb2.PrefillRequest) -> common_pb2.HandoffState:
        """Computes the prompt's KV into the hand-off and samples the first token; returns once the hand-off is sealed.

        Cancelling it frees what it held. Whatever ends it otherwise is told to whoever waits for the hand-off, too.
        """
        task = asyncio.current_task()
        assert task is not None
        job = self._open(request, task)
        timer = asyncio.get_running_loop().call_later(max(job.sequence.remaining_s, 0.0), job.time_out)
        error: HalfmoonError | None = InternalError(
            f"request {job.sequence.request_id} broke the prefill worker; its log has the traceback"
        )
        try:
            state = await self._prefill(job)
            error = None
            return state
        except asyncio.CancelledError:
            if job.error is None:
                error = RequestCancelled(f"request {job.sequence.request_id} was cancelled in prefill")
                raise
            task.uncancel()
            error = job.error
            raise error from None
        except HalfmoonError as failure:
            error = failure
            raise
        finally:
            timer.cancel()
            self._close(job, error)

    def _open(self, request: worker_pb2.PrefillRequest, task: asyncio.Task[None]) -> PrefillJob:
        """Raises InvalidRequest, PromptTooLong, WorkerLost."""
        self.life.require_sound()
        sequence = Sequence.from_proto(request.sequence)
        check_sequence(sequence, self.engine.config.vocab_size, self.engine.max_model_len)
        keys = sent_or_made_keys(request.sequence.block_keys, self._root, sequence.token_ids, self.engine.page_size)
        loop = asyncio.get_running_loop()
        job = PrefillJob(request, sequence, keys, task, loop.create_future(), loop.create_future())
        with self._changed:
            self.scheduler.add(sequence)
        self._jobs[sequence] = job
        self._start_waiting()
        return job

    async def _prefill(self, job: PrefillJob) -> common_pb2.HandoffState:
        await job.started
        if tail := job.sequence.num_tokens % self.engine.page_size:
            # an earlier owner's KV must not travel in the rest of the last page; pushes come behind this on the same thread
            self._transfer.submit(partial(self.engine.cache.zero_tail, job.sequence.pages[-1], tail))
        await self._prepare(job)
        assert job.client is not None and job.writer is not None
        self._pusher.push_prefix(job)
        with self._changed:
            self.scheduler.ready(job.sequence, job.num_cached_tokens)
            self._changed.notify()
        await job.pushed
        await job.writer.seal(job.state())
        state = job.state()
        self.metrics.transferred(job.client.transport, "push", job.writer.num_bytes, state.phases.push_s)
        return state

    async def _prepare(self, job: PrefillJob) -> None:
        """Loads the prefix and reserves room for the hand-off, at the same time. Nothing that is loaded stays pinned for the other's sake.

        Raises what the reserve raises; HandoffCorrupt where it was promised a block that the load found corrupt, which is gone now.
        """
        preparing = [asyncio.ensure_future(self._loader.load(job)), asyncio.ensure_future(self._reserve(job))]
        try:
            await asyncio.gather(*preparing)
        finally:
            for task in preparing:
                task.cancel()
            await asyncio.wait(preparing)
        assert job.writer is not None
        if job.corrupt_in is job.client and any(job.writer.present[block] for block in job.corrupt_blocks):
            raise HandoffCorrupt(
                f"cached blocks of {job.sequence.request_id} do not match their checksums and were dropped; the next attempt computes them"
            )

    async def _reserve(self, job: PrefillJob) -> None:
        """Sets the job's client and writer."""
        client = await self.stores.client(job.request.store_address)
        if self._flip_pushed_bytes:
            flip_pushed_bytes(client)
        handoff = job.request.handoff
        num_blocks = div_ceil(job.sequence.num_tokens, self.engine.page_size)
        writer = await client.reserve(handoff.id, handoff.epoch, job.block_keys, num_blocks, job.sequence.remaining_s)
        job.client, job.writer = client, writer

    def _close(self, job: PrefillJob, error: HalfmoonError | None) -> None:
        job.closed = True
        with self._changed:
            self.scheduler.abort(job.sequence)
        del self._jobs[job.sequence]
        self.life.spawn(self._release(job, error))

    async def _release(self, job: PrefillJob, error: HalfmoonError | None) -> None:
        """Tells the store of a failure, or keeps the blocks; frees the pages once no thread touches them."""
        try:
            if error is not None:
                await self._abort(job, error)
            elif not self.stores.is_own(job.request.store_address) and job.block_keys:
                await self._pusher.keep(job, self.stores.own.client)
        except HalfmoonError as failure:
            logger.info("request %s: after its end, %s", job.sequence.request_id, failure)
        finally:
            await self._transfer.drained()
            with self._changed:
                self.scheduler.release(job.sequence)
            self._start_waiting()

    async def _abort(self, job: PrefillJob, error: HalfmoonError) -> None:
        if job.writer is not None:
            await job.writer.abort(error)
            return
        client = await self.stores.client(job.request.store_address)
        await client.abort(job.request.handoff.id, job.request.handoff.epoch, error)

    def _start_waiting(self) -> None:
        """Whenever pages may have become free, or somebody came."""
        with self._changed:
            started = self.scheduler.start()
        for sequence in started:
            job = self._jobs.get(sequence)
            if job is not None and not job.started.done():
                job.started.set_result(None)

    def _store_lost(self, client: StoreClient) -> None:
        self._pins.lost(client)
        for job in list(self._jobs.values()):
            if job.client is client:
                job.fail(StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    def _stepped(self, seconds: float, num_tokens: int) -> None:
        self.metrics.stepped(seconds, num_tokens)
        self._start_waiting()

    # what the life around it asks for

    def _load_engine(self) -> Engine:
        config, progress = self._config, self.life.progress.report
        return Engine.load(self._options, kv_capacity_tokens=config.kv_capacity_tokens, num_threads=config.num_threads, progress=progress)

    def _fail_all(self, error: WorkerLost) -> None:
        for job in list(self._jobs.values()):
            job.fail(error)

    def _info(self) -> control_pb2.MemberInfo:
        info = self.engine.member_info()
        info.role, info.address, info.store_id = control_pb2.ROLE_PREFILL, self.address, self.stores.own.client.store_id
        return info
