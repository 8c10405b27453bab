"""The prefill worker: a queue of prompts, an engine on a thread of its own, and the stores it reads from and pushes to.

event loop       Prefill ─► add ─► start ─► reserve ─► load prefix ─► ready ┐         ┌─► seal ─► reply
engine thread                                        schedule ─► forward ─► record    │   sleeps when there is nothing to do
transfer thread                                   copies prefixes in, pushes layers ──┘

Threads share the scheduler under one condition, and tell the loop what happened with call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import grpc.aio
import torch

from ..engine.engine import Engine
from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence, StepChunk
from ..engine.transfer import TransferThread
from ..kvstore.client import BlockWriter, StoreClient
from ..protocol.blocks import block_keys, div_ceil, root_key
from ..protocol.config import ModelOptions, PrefillConfig
from ..protocol.errors import HalfmoonError, InternalError, InvalidRequest, PromptTooLong, RequestCancelled, StoreUnavailable, WorkerLost
from ..protocol.exporter import serve_metrics
from ..protocol.membership import stay_joined
from ..protocol.v1 import common_pb2, control_pb2, worker_pb2
from .fault import flip_pushed_bytes
from .job import PrefillJob
from .loader import PrefixLoader
from .metrics import PrefillMetrics
from .pusher import BlockPusher, finished_blocks
from .scheduler import PrefillScheduler, Step
from .service import start_server
from .stores import Stores

logger = logging.getLogger(__name__)


class PrefillWorker:
    """Everything but the engine's and the transfer thread's calls happens on the event loop that start() runs on.

    Args:
        host: to listen on. node_id: stores that name the same one share their memory with this worker.
        flip_pushed_bytes: a fault for tests: bytes are altered on their way to the store.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        node_id: str,
        host: str,
        store_address: str,
        proxy_address: str,
        options: ModelOptions,
        config: PrefillConfig,
        flip_pushed_bytes: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self._node_id = node_id
        self._host = host
        self._store_address = store_address
        self._proxy_address = proxy_address
        self._options = options
        self._config = config
        self._flip_pushed_bytes = flip_pushed_bytes
        self._changed = threading.Condition()  # guards the scheduler and _stopping
        self._stopping = False
        self._jobs: dict[Sequence, PrefillJob] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.joined = asyncio.Event()  # the proxy knows of this worker
        self._stopped = asyncio.Event()
        self._server: grpc.aio.Server | None = None  # from start() to stop()
        self._broken: BaseException | None = None

    async def start(self) -> str:
        """Loads the model, attaches to the store, listens and joins the proxy. Returns "host:port".

        Raises CheckpointError, ConfigError, StoreUnavailable, SchemaMismatch.
        """
        self._loop = asyncio.get_running_loop()
        self.engine = await asyncio.to_thread(
            partial(Engine.load, self._options, kv_capacity_tokens=self._config.kv_capacity_tokens, num_threads=self._config.num_threads)
        )
        cache = self.engine.cache
        self.scheduler = PrefillScheduler(PageAllocator(cache.num_pages), cache.page_size, self._config.max_tokens_per_step)
        self.metrics = PrefillMetrics(self.scheduler)
        self._root = root_key(self.engine.schema.fingerprint)
        self.stores = Stores(
            self._store_address,
            client_id=self.worker_id,
            node_id=self._node_id,
            schema=self.engine.schema,
            transport=self._config.transport,
            on_lost=self._store_lost,
        )
        await self.stores.own.attach()
        self._transfer = TransferThread(f"{self.worker_id}-transfer", self.engine.device, self._crashed)
        self._loader = PrefixLoader(cache, self.stores, self._transfer, self.metrics, self._spawn)
        self._pusher = BlockPusher(cache, self._transfer, self.metrics)
        self._engine_thread = threading.Thread(target=self._run_engine, name=f"{self.worker_id}-engine", daemon=True)
        self._engine_thread.start()
        self._server, self.address = await start_server(self, self._host)
        metrics_address, self._stop_metrics = serve_metrics(self.metrics.registry, self._host)
        self._attachment = asyncio.create_task(self.stores.own.stay_attached())
        self._attachment.add_done_callback(self._background_done)
        self._membership = asyncio.create_task(stay_joined(self._proxy_address, self._info(metrics_address), self.load, self.joined.set))
        logger.info("%s serves on %s", self.worker_id, self.address)
        return self.address

    async def serve_until_stopped(self) -> None:
        """Raises what broke the worker."""
        await self._stopped.wait()
        if self._broken is not None:
            raise self._broken

    async def stop(self, grace_s: float) -> None:
        """Leaves the proxy, gives running calls grace_s, then ends them and everything else. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        self._membership.cancel()
        await server.stop(grace_s)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._engine_thread.join)
        if self._background:  # blocks being kept, leases being released
            await asyncio.wait(self._background, timeout=grace_s)
        tasks = (self._membership, self._attachment, *self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.stores.close()
        await asyncio.to_thread(self._transfer.close)
        await asyncio.to_thread(self._stop_metrics)
        self._stopped.set()

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
        timer = self._loop.call_later(max(job.sequence.remaining_s, 0.0), job.time_out)
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
        if self._broken is not None:
            raise WorkerLost(f"prefill worker {self.worker_id} broke: {self._broken}", worker_id=self.worker_id)
        sequence = Sequence.from_proto(request.sequence)
        check_sequence(sequence, self.engine.config.vocab_size, self.engine.max_model_len)
        keys = block_keys(self._root, sequence.token_ids, self.engine.page_size)
        job = PrefillJob(request, sequence, keys, task, self._loop.create_future(), self._loop.create_future())
        with self._changed:
            self.scheduler.add(sequence)
        self._jobs[sequence] = job
        self._start_waiting()
        return job

    async def _prefill(self, job: PrefillJob) -> common_pb2.HandoffState:
        await job.started
        if tail := job.sequence.num_tokens % self.engine.page_size:
            # an earlier owner's KV must not travel in the rest of the last page
            await self._transfer.run(partial(self.engine.cache.zero_tail, job.sequence.pages[-1], tail))
        # before the reserve: what is corrupt is out of the store by then, and nothing is pinned while we wait for room
        await self._loader.load(job)
        job.client, job.writer = await self._reserve(job)
        self._pusher.push_prefix(job)
        with self._changed:
            self.scheduler.ready(job.sequence, job.num_cached_tokens)
            self._changed.notify()
        await job.pushed
        await job.writer.seal(job.state())
        state = job.state()
        self.metrics.transferred(job.client.transport, "push", job.writer.num_bytes, state.phases.push_s)
        return state

    async def _reserve(self, job: PrefillJob) -> tuple[StoreClient, BlockWriter]:
        client = await self.stores.client(job.request.store_address)
        if self._flip_pushed_bytes:
            flip_pushed_bytes(client)
        handoff = job.request.handoff
        num_blocks = div_ceil(job.sequence.num_tokens, self.engine.page_size)
        return client, await client.reserve(handoff.id, handoff.epoch, job.block_keys, num_blocks, job.sequence.remaining_s)

    def _close(self, job: PrefillJob, error: HalfmoonError | None) -> None:
        job.closed = True
        with self._changed:
            self.scheduler.abort(job.sequence)
        del self._jobs[job.sequence]
        self._spawn(self._let_go(job, error))

    async def _let_go(self, job: PrefillJob, error: HalfmoonError | None) -> None:
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
        for job in list(self._jobs.values()):
            if job.client is client:
                job.fail(StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    # the engine's thread

    def _run_engine(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                self._run_step(step)
        except Exception as error:  # the thread's boundary: the loop has to hear of it, or every call would hang
            logger.exception("%s: the engine broke", self.worker_id)
            self._crashed(error)

    def _next_step(self) -> Step | None:
        """Sleeps until there is one; None when stopping."""
        with self._changed:
            while not self._stopping:
                step = self.scheduler.schedule()
                if step.chunks:
                    return step
                self._changed.wait()
        return None

    def _run_step(self, step: Step) -> None:
        began = time.monotonic()
        runs = [finished_blocks(job, chunk, self.engine.page_size) for job, chunk in self._jobs_of(step, began)]
        logits = self.engine.forward(step.chunks, after_layer=partial(self._pusher.push_layer, runs))
        sampled, num_tokens = step.sampled, step.num_tokens
        samples = self.engine.sample(logits, sampled) if sampled else []
        if self.engine.device.type == "cuda":
            # a page that record() frees may be another's at once
            torch.cuda.current_stream(self.engine.device).synchronize()
        now = time.monotonic()
        done: list[PrefillJob] = []
        for sequence, sample in zip(sampled, samples, strict=True):
            job = self._jobs.get(sequence)
            if job is not None:
                job.sample, job.sampled = sample, now
                done.append(job)
        with self._changed:
            self.scheduler.record(step)
        self._pusher.finish(done)
        self._tell(partial(self._stepped, now - began, num_tokens))

    def _jobs_of(self, step: Step, now: float) -> list[tuple[PrefillJob, StepChunk]]:
        """Less the calls that have ended since the step was scheduled."""
        found: list[tuple[PrefillJob, StepChunk]] = []
        for chunk in step.chunks:
            job = self._jobs.get(chunk.sequence)
            if job is not None:
                job.first_chunk = job.first_chunk or now
                found.append((job, chunk))
        return found

    def _stepped(self, seconds: float, num_tokens: int) -> None:
        self.metrics.stepped(seconds, num_tokens)
        self._start_waiting()

    # faults and background work

    def _tell(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _crashed(self, error: BaseException) -> None:
        """Any thread."""
        self._tell(partial(self._break, error))

    def _break(self, error: BaseException) -> None:
        """Something is wrong that no request caused: leaves the proxy, fails every call; serve_until_stopped raises."""
        if self._broken is None:
            self._broken = error
            self._stopped.set()
            self._membership.cancel()
        for job in list(self._jobs.values()):
            job.fail(WorkerLost(f"prefill worker {self.worker_id} broke: {error}", worker_id=self.worker_id))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("%s: background work failed", self.worker_id, exc_info=error)
            self._break(error)

    def _info(self, metrics_address: str) -> control_pb2.MemberInfo:
        return control_pb2.MemberInfo(
            id=self.worker_id,
            incarnation=uuid.uuid4().hex,
            role=control_pb2.ROLE_PREFILL,
            address=self.address,
            metrics_address=metrics_address,
            node_id=self._node_id,
            store_id=self.stores.own.client.store_id,
            store_address=self._store_address,
            schema=self.engine.schema.to_proto(),
            max_model_len=self.engine.max_model_len,
            kv_capacity_tokens=self.engine.cache.num_pages * self.engine.page_size,
            pid=os.getpid(),
            device=str(self.engine.device),
        )


def check_sequence(sequence: Sequence, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest for tokens that the model does not have, PromptTooLong."""
    if not 1 <= sequence.num_prompt_tokens <= sequence.num_tokens:
        raise InvalidRequest(
            f"num_prompt_tokens is {sequence.num_prompt_tokens} of {sequence.num_tokens} token_ids; it must be at least 1 and at most all",
            param="num_prompt_tokens",
        )
    largest = max(sequence.token_ids)
    if largest >= vocab_size:
        raise InvalidRequest(f"token {largest} is not of the model's {vocab_size} tokens; use the model's own tokenizer", param="token_ids")
    if sequence.num_tokens >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {sequence.num_tokens} tokens; with at least one of the answer the model takes {max_model_len}",
            num_tokens=sequence.num_tokens,
            limit=max_model_len - 1,
        )
