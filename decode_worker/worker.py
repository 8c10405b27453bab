"""The decode worker: hand-offs taken in, sequences batched continuously on an engine on a thread of its own, tokens streamed.

event loop       Decode ─► fetch ─► add ─► start ─► verify ─► admit ┐     ┌─► tokens ─► reply stream      finished ─► keep
                   └─ local prefill: ─► add ─► start ─► prefix ─► begin_prefill
engine thread                                   schedule ─► forward ─► record    sleeps when there is nothing to do
transfer thread              copies slices into pages ──────────────┘                          pages ─► store ────────┘

Threads share the scheduler under one condition; what a step gave comes to the loop with one call_soon_threadsafe.
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
from typing import Any, NamedTuple

import grpc.aio
import torch

from ..engine.engine import Engine
from ..engine.model_config import ModelConfig
from ..engine.page_allocator import PageAllocator
from ..engine.resolve import resolve_device, resolve_folder, resolve_max_model_len
from ..engine.sequence import Sequence
from ..engine.transfer import TransferThread
from ..kvstore.client import BlockReader, StoreClient
from ..kvstore.store_link import StoreLink
from ..protocol.blocks import block_keys, root_key
from ..protocol.config import DecodeConfig, ModelOptions
from ..protocol.errors import (
    HalfmoonError,
    HandoffAborted,
    HandoffError,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
)
from ..protocol.exporter import serve_metrics
from ..protocol.membership import stay_joined
from ..protocol.v1 import common_pb2, control_pb2, worker_pb2
from .job import DecodeJob
from .loader import HandoffLoader, check_layout
from .local_prefill import LocalPrefill
from .metrics import DecodeMetrics
from .pusher import BlockPusher
from .scheduler import DecodeScheduler, Step
from .service import start_server

logger = logging.getLogger(__name__)

CPU_CAPACITY = 8  # times max_model_len, where no capacity is configured


class StepOutput(NamedTuple):
    """What a step gave to a job."""

    job: DecodeJob
    token: common_pb2.TokenOutput
    finish_reason: common_pb2.FinishReason | None


class DecodeWorker:
    """Everything but the engine's and the transfer thread's calls happens on the event loop that start() runs on.

    Args:
        host: to listen on. node_id: stores that name the same one share their memory with this worker.
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
        config: DecodeConfig,
    ) -> None:
        self.worker_id = worker_id
        self._node_id = node_id
        self._host = host
        self._store_address = store_address
        self._proxy_address = proxy_address
        self._options = options
        self._config = config
        self._changed = threading.Condition()  # guards the scheduler and _stopping
        self._stopping = False
        self._jobs: dict[Sequence, DecodeJob] = {}
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
        self.engine = await asyncio.to_thread(self._load_engine)
        cache = self.engine.cache
        self.scheduler = DecodeScheduler(
            PageAllocator(cache.num_pages),
            cache.page_size,
            eos_token_ids=self.engine.config.eos_token_ids,
            max_running=self._config.max_running,
            max_prefill_tokens_per_step=self._config.max_prefill_tokens_per_step,
        )
        self.metrics = DecodeMetrics(self.scheduler)
        self._root = root_key(self.engine.schema.fingerprint)
        self.store = StoreLink(
            self._store_address,
            client_id=self.worker_id,
            node_id=self._node_id,
            schema=self.engine.schema,
            transport=self._config.transport,
            on_lost=self._store_lost,
        )
        await self.store.attach()
        self._transfer = TransferThread(f"{self.worker_id}-transfer", self.engine.device, self._crashed)
        self._loader = HandoffLoader(cache, self.engine.config.vocab_size, self._transfer)
        self._pusher = BlockPusher(cache, self._transfer, self.metrics)
        self._local = LocalPrefill(cache, self.store, self._transfer, self.metrics, self._spawn, self._release_reader)
        self._engine_thread = threading.Thread(target=self._run_engine, name=f"{self.worker_id}-engine", daemon=True)
        self._engine_thread.start()
        self._server, self.address = await start_server(self, self._host)
        metrics_address, self._stop_metrics = serve_metrics(self.metrics.registry, self._host)
        self._attachment = asyncio.create_task(self.store.stay_attached())
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
        await self.store.close()
        await asyncio.to_thread(self._transfer.close)
        await asyncio.to_thread(self._stop_metrics)
        self._stopped.set()

    def load(self) -> control_pb2.MemberLoad:
        """Calls whose hand-off has not begun count as waiting, too."""
        with self._changed:
            num_running = self.scheduler.num_running
            return control_pb2.MemberLoad(
                num_running=num_running,
                num_waiting=len(self._jobs) - num_running,
                num_outstanding_tokens=sum(sequence.num_tokens for sequence in self._jobs),
                kv_usage_ratio=self.scheduler.allocator.usage_ratio,
            )

    def open(self, request: worker_pb2.DecodeRequest) -> DecodeJob:
        """Waits for the hand-off from now on, or computes the prompt; what comes is read from the job. close() has to follow.

        Raises InvalidRequest, PromptTooLong, WorkerLost.
        """
        if self._broken is not None:
            raise WorkerLost(f"decode worker {self.worker_id} broke: {self._broken}", worker_id=self.worker_id)
        sequence = Sequence.from_proto(request.sequence)
        check_sequence(sequence, self.engine.config.vocab_size, self.engine.max_model_len)
        self.scheduler.check(sequence)
        keys = block_keys(self._root, sequence.token_ids, self.engine.page_size)
        job = DecodeJob(request, sequence, keys, self._loop.create_future())
        job.timer = self._loop.call_later(max(sequence.remaining_s, 0.0), self._time_out, job)
        self._jobs[sequence] = job
        job.intake = self._loop.create_task(self._prefill(job) if job.is_local else self._take_in(job))
        job.intake.add_done_callback(partial(self._intake_done, job))
        return job

    def close(self, job: DecodeJob) -> None:
        """Nobody reads the job any more: frees everything it holds, unless it has ended. Idempotent."""
        self._fail(job, RequestCancelled(f"request {job.sequence.request_id} was cancelled in decode"))

    def stop_sequence(self, request_id: str) -> bool:
        """Ends a request as finished, with the tokens it has; its blocks are kept. False where there is none."""
        found = [job for job in self._jobs.values() if job.sequence.request_id == request_id]
        for job in found:
            with self._changed:
                self.scheduler.finish(job.sequence)
            self._finish(job, common_pb2.FINISH_REASON_STOP)
        return bool(found)

    async def _take_in(self, job: DecodeJob) -> None:
        """From the fetch to the admission."""
        handoff = job.request.handoff
        try:
            client = self.store.client
            job.reader = await client.fetch(handoff.id, handoff.epoch, job.sequence.remaining_s)
            if job.ended:
                return
            check_layout(job, job.reader, self.engine.page_size)
            with self._changed:
                self.scheduler.add(job.sequence)
            self._start_waiting()
            state = await self._loader.load(job, job.reader)
        except HalfmoonError as error:
            if isinstance(error, HandoffError) and not isinstance(error, HandoffAborted):
                logger.warning("request %s refused: %s", job.sequence.request_id, error)
                self.metrics.handoff_refused(error.code)
            self._fail(job, error)
            return
        if job.ended:
            return
        self._admit(job, state)
        self.metrics.transferred(client.transport, "fetch", job.reader.num_bytes, job.phases().intake_s)
        self._spawn(self._release_reader(job.reader))

    async def _prefill(self, job: DecodeJob) -> None:
        """Without a hand-off: to the moment from which the engine's steps compute the prompt."""
        with self._changed:
            self.scheduler.add(job.sequence)
        self._start_waiting()
        await job.granted
        await self._local.load(job)
        if job.ended:
            return
        with self._changed:
            self.scheduler.begin_prefill(job.sequence, job.num_cached_tokens)
            self._changed.notify()

    def _intake_done(self, job: DecodeJob, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a bug, and this request's alone
            logger.error("request %s: its intake failed", job.sequence.request_id, exc_info=error)
            self._fail(job, InternalError(f"{type(error).__name__}: {error}; the decode worker's log has the traceback"))

    def _admit(self, job: DecodeJob, state: common_pb2.HandoffState) -> None:
        with self._changed:
            reason = self.scheduler.admit(job.sequence, state.first_token.token_id)
            self._changed.notify()
        job.admit(state)
        if reason is not None:
            self._finish(job, reason)

    def _start_waiting(self) -> None:
        """Whenever pages may have become free, or somebody came."""
        with self._changed:
            started = self.scheduler.start()
            self._changed.notify()  # those that were preempted run again
        for sequence in started:
            job = self._jobs.get(sequence)
            if job is not None and not job.granted.done():
                job.granted_at = time.monotonic()
                job.granted.set_result(None)

    def _time_out(self, job: DecodeJob) -> None:
        self._fail(job, job.timeout_error())

    def _store_lost(self, client: StoreClient) -> None:
        """Who has its hand-off, or needs none, needs no store any more."""
        for job in list(self._jobs.values()):
            if not (job.sealed_at or job.is_local):
                self._fail(job, StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    # ends

    def _finish(self, job: DecodeJob, reason: common_pb2.FinishReason) -> None:
        if not job.ended:
            job.finish_reason = reason
            self._end(job)

    def _fail(self, job: DecodeJob, error: HalfmoonError) -> None:
        if not job.ended:
            job.error = error
            with self._changed:
                self.scheduler.abort(job.sequence)
            self._end(job)

    def _end(self, job: DecodeJob) -> None:
        with self._changed:
            job.num_preemptions = self.scheduler.num_preemptions(job.sequence)
        del self._jobs[job.sequence]
        self._local.forget(job)
        if job.timer is not None:
            job.timer.cancel()
        job.changed.set()
        self._spawn(self._let_go(job))

    async def _let_go(self, job: DecodeJob) -> None:
        """Keeps the blocks, or tells the store of a hand-off that nobody takes; frees the pages once no thread touches them."""
        try:
            if job.state is None and not job.is_local:
                await self._give_up_handoff(job)
            elif job.finish_reason is not None:
                await self._pusher.keep(job, self.store.client, self._root)
        except HalfmoonError as failure:
            logger.info("request %s: after its end, %s", job.sequence.request_id, failure)
        finally:
            await self._end_intake(job)
            await self._transfer.drained()
            with self._changed:
                self.scheduler.release(job.sequence)
            self._start_waiting()
        if job.reader is not None:
            await self._release_reader(job.reader)

    async def _give_up_handoff(self, job: DecodeJob) -> None:
        """Before the intake ends: the store would have to make up a reason. Raises StoreUnavailable."""
        handoff = job.request.handoff
        reason = job.error or RequestCancelled(f"request {job.sequence.request_id} was stopped before its hand-off was there")
        await self.store.client.abort(handoff.id, handoff.epoch, reason)
        job.given_up = True

    async def _end_intake(self, job: DecodeJob) -> None:
        if job.intake is None:
            return
        if job.reader is not None or not job.given_up:
            job.intake.cancel()
        # else its fetch is being told of the abort, maybe with a lease to release: cancelled now, it would never know
        await asyncio.wait({job.intake})

    async def _release_reader(self, reader: BlockReader) -> None:
        """Idempotent."""
        await self._transfer.drained()  # a cancelled intake may still be copying out of the reader's memory
        try:
            await reader.release()
        except HalfmoonError as error:
            logger.warning("a hand-off's lease could not be released: %s", error)

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
                if step.chunks or step.preempted:
                    return step
                self._changed.wait()
        return None

    def _run_step(self, step: Step) -> None:
        began = time.monotonic()
        outputs: list[StepOutput] = []
        num_tokens = step.num_tokens
        if step.chunks:
            self._local.stepping(step, began)
            logits = self.engine.forward(step.chunks)
            sampled = step.sampled
            samples = self.engine.sample(logits, sampled) if sampled else []
            if self.engine.device.type == "cuda":
                # a page that record() frees may be another's at once
                torch.cuda.current_stream(self.engine.device).synchronize()
            with self._changed:
                generated = self.scheduler.record(step, [sample.token_id for sample in samples])
            for sequence, row, reason in generated:
                job = self._jobs.get(sequence)
                if job is not None:
                    outputs.append(StepOutput(job, samples[row].to_proto(), reason))
        self._tell(partial(self._stepped, outputs, time.monotonic() - began, num_tokens, step.preempted))

    def _stepped(self, outputs: list[StepOutput], seconds: float, num_tokens: int, preempted: list[Sequence]) -> None:
        self.metrics.stepped(seconds, num_tokens, len(preempted))
        for sequence in preempted:
            if sequence in self._jobs:
                self._local.preempted(self._jobs[sequence])
        for job, token, reason in outputs:
            if job.ended:
                continue
            self._local.push(job, token)
            if reason is not None:
                self._finish(job, reason)
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
            self._fail(job, WorkerLost(f"decode worker {self.worker_id} broke: {error}", worker_id=self.worker_id))

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

    def _load_engine(self) -> Engine:
        num_tokens = self._config.kv_capacity_tokens
        if num_tokens == 0 and resolve_device(self._options) == "cpu":
            model = ModelConfig.from_folder(resolve_folder(self._options))
            num_tokens = CPU_CAPACITY * resolve_max_model_len(model, self._options)
        config = self._config
        return Engine.load(
            self._options, kv_capacity_tokens=num_tokens, num_threads=config.num_threads, max_decode_batch=config.max_running
        )

    def _info(self, metrics_address: str) -> control_pb2.MemberInfo:
        return control_pb2.MemberInfo(
            id=self.worker_id,
            incarnation=uuid.uuid4().hex,
            role=control_pb2.ROLE_DECODE,
            address=self.address,
            metrics_address=metrics_address,
            node_id=self._node_id,
            store_id=self.store.client.store_id,
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
    longest = sequence.num_prompt_tokens + sequence.sampling.max_tokens
    if longest > max_model_len or sequence.num_tokens >= max_model_len:
        raise PromptTooLong(
            f"prompt and max_tokens are {sequence.num_prompt_tokens} + {sequence.sampling.max_tokens} tokens; "
            f"the model takes {max_model_len}",
            num_tokens=longest,
            limit=max_model_len,
        )
