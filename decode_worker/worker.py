"""The decode worker: hand-offs taken in, sequences batched continuously on an engine on a thread of its own, tokens streamed.

event loop       Decode ─► fetch ─► add ─► start ─► verify ─► admit ┐     ┌─► tokens ─► reply stream      finished ─► keep
                   └─ local prefill: ─► add ─► start ─► prefix ─► begin_prefill
engine thread                                   schedule ─► compute ─► record    sleeps when there is nothing to do
transfer thread              copies slices into pages ──────────────┘                          pages ─► store ────────┘

Threads share the scheduler under one condition; what a step gave comes to the loop with one call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from ..engine.arena_pins import ArenaPins
from ..engine.engine import Engine
from ..engine.model_config import ModelConfig
from ..engine.page_allocator import PageAllocator
from ..engine.resolve import resolve_device, resolve_folder, resolve_max_model_len
from ..engine.sequence import Sequence
from ..engine.transfer import TransferThread
from ..kvstore.client import StoreClient
from ..kvstore.store_link import StoreLink
from ..protocol.blocks import root_key, sent_or_made_keys
from ..protocol.config import DecodeConfig, ModelOptions
from ..protocol.errors import (
    HalfmoonError,
    HandoffAborted,
    HandoffError,
    InternalError,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
)
from ..protocol.v1 import common_pb2, control_pb2, worker_pb2
from ..protocol.worker_life import WorkerAddress, WorkerLife
from .job import DecodeJob, check_sequence
from .loader import HandoffLoader
from .local_prefill import LocalPrefill, local_state
from .metrics import DecodeMetrics
from .pusher import BlockPusher
from .scheduler import DecodeScheduler
from .service import start_server
from .step_samples import StepSamples
from .steps import DecodeSteps, StepResult

logger = logging.getLogger(__name__)

KEEP_PATIENCE_S = 0.1  # how long an answer's end waits for its blocks to be kept; a slow store costs the next turn its prefix and no more
CPU_CAPACITY = 8  # times max_model_len, where no capacity is configured


class DecodeWorker:
    """Everything but the engine's and the transfer thread's calls happens on the event loop that start() runs on."""

    def __init__(self, worker_address: WorkerAddress, *, options: ModelOptions, config: DecodeConfig) -> None:
        self.worker_id = worker_address.worker_id
        self.life = WorkerLife(worker_address, self._fail_all)
        self._options = options
        self._config = config
        self._jobs: dict[Sequence, DecodeJob] = {}
        self._samples = StepSamples()

    async def start(self) -> str:
        """Loads the model, attaches to the store, listens and joins the proxy. Returns "host:port".

        Raises CheckpointError, ConfigError, StoreUnavailable, SchemaMismatch.
        """
        life, worker_address = self.life, self.life.worker_address
        self.engine = await life.load(self._load_engine)
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
        self._transfer = TransferThread(f"{self.worker_id}-transfer", self.engine.device, life.crashed)
        self._pins = ArenaPins(cache, self._transfer)
        self.store = StoreLink(
            worker_address.store_address,
            client_id=self.worker_id,
            node_id=worker_address.node_id,
            schema=self.engine.schema,
            transport=self._config.transport,
            on_lost=self._store_lost,
            on_attached=self._pins.attached,
        )
        await self.store.attach()
        self._loader = HandoffLoader(cache, self.store, self._transfer, self.metrics, self.engine.config.vocab_size)
        self._local = LocalPrefill(cache, self.store, self._transfer, self.metrics, life.spawn, self._loader.release)
        self._steps = DecodeSteps(self.engine, self.scheduler, self._jobs, self._local, self._samples, life, self._stepped)
        self._changed = self._steps.changed  # guards the scheduler
        self._pusher = BlockPusher(cache, self.store, self._transfer, self.metrics, self.scheduler, self._changed)
        self._steps.start()
        server, self.address = await start_server(self, worker_address.host)
        life.tend(self.store.stay_attached())
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
        await self.store.close()
        await asyncio.to_thread(self._transfer.close)
        await self._pins.close()
        await self.life.end()

    def load(self) -> control_pb2.MemberLoad:
        """Calls whose hand-off has not begun count as waiting, too."""
        with self._changed:
            num_running = self.scheduler.num_running
            return control_pb2.MemberLoad(
                num_running=num_running,
                num_waiting=len(self._jobs) - num_running,
                num_outstanding_tokens=sum(sequence.num_tokens for sequence in self._jobs),
                kv_usage_ratio=self.scheduler.allocator.usage_ratio,
                steps=self._samples.take(),
                num_prefill_tokens=sum(
                    job.sequence.num_tokens - job.sequence.num_computed_tokens
                    for job in self._jobs.values()
                    if job.is_local and job.state is None
                ),
            )

    def open(self, request: worker_pb2.DecodeRequest) -> DecodeJob:
        """Waits for the hand-off from now on, or computes the prompt; what comes is read from the job. close() has to follow.

        Raises InvalidRequest, PromptTooLong, WorkerLost.
        """
        self.life.require_sound()
        sequence = Sequence.from_proto(request.sequence)
        check_sequence(sequence, self.engine.config.vocab_size, self.engine.max_model_len)
        self.scheduler.check(sequence)
        keys = sent_or_made_keys(request.sequence.block_keys, self._root, sequence.token_ids, self.engine.page_size)
        loop = asyncio.get_running_loop()
        job = DecodeJob(request, sequence, keys, loop.create_future())
        job.timer = loop.call_later(max(sequence.remaining_s, 0.0), self._time_out, job)
        self._jobs[sequence] = job
        job.intake = loop.create_task(self._prefill(job) if job.is_local else self._take_in(job))
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
        try:
            await self._loader.open(job)
            if job.ended:
                return
            with self._changed:
                self.scheduler.add(job.sequence)
            self._start_waiting()
            state = await self._loader.load(job)
        except HalfmoonError as error:
            if isinstance(error, HandoffError) and not isinstance(error, HandoffAborted):
                logger.warning("request %s refused: %s", job.sequence.request_id, error)
                self.metrics.handoff_refused(error.code)
            self._fail(job, error)
            return
        if job.ended:
            return
        self._admit(job, state)
        self._loader.count(job)
        self.life.spawn(self._loader.release(job))

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
        self._pins.lost(client)
        for job in list(self._jobs.values()):
            if not (job.sealed_at or job.is_local):
                self._fail(job, StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    # ends

    def _finish(self, job: DecodeJob, reason: common_pb2.FinishReason) -> None:
        """Who is told of the end finds the blocks of the answer in the store, where that takes no longer than KEEP_PATIENCE_S."""
        if not job.ended:
            job.finish_reason = reason
            self._end(job)
            asyncio.get_running_loop().call_later(KEEP_PATIENCE_S, job.let_finish)

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
        self.life.spawn(self._let_go(job))

    async def _let_go(self, job: DecodeJob) -> None:
        """Keeps the blocks, or tells the store of a hand-off that nobody takes; frees the pages once no thread touches them."""
        if job.publishing is not None:
            await asyncio.wait({job.publishing})
        try:
            if job.state is None and not job.is_local:
                await self._loader.give_up(job)
            elif job.finish_reason is not None:
                await self._pusher.keep(job, self._root)
        except HalfmoonError as failure:
            logger.info("request %s: after its end, %s", job.sequence.request_id, failure)
        finally:
            job.let_finish()
            await self._loader.end_intake(job)
            await self._transfer.drained()
            with self._changed:
                self.scheduler.release(job.sequence)
            self._start_waiting()
        await self._loader.release(job)

    def _stepped(self, result: StepResult) -> None:
        self.metrics.stepped(result.seconds, result.num_tokens, len(result.preempted))
        for sequence in result.preempted:
            if sequence in self._jobs:
                self._local.preempted(self._jobs[sequence])
        for job, token, reason in result.outputs:
            if job.ended:
                continue
            if job.state is None:
                job.admit(local_state(job, token))
                job.publishing = self.life.spawn(self._pusher.publish(job)) if reason is None else None
            else:
                job.push(token)
            if reason is not None:
                self._finish(job, reason)
        self._start_waiting()

    # what the life around it asks for

    def _load_engine(self) -> Engine:
        config, num_tokens = self._config, self._config.kv_capacity_tokens
        if num_tokens == 0 and resolve_device(self._options) == "cpu":
            model = ModelConfig.from_folder(resolve_folder(self._options))
            num_tokens = CPU_CAPACITY * resolve_max_model_len(model, self._options)
        return Engine.load(
            self._options,
            kv_capacity_tokens=num_tokens,
            num_threads=config.num_threads,
            max_decode_batch=config.max_running,
            progress=self.life.progress.report,
        )

    def _fail_all(self, error: WorkerLost) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, error)

    def _info(self) -> control_pb2.MemberInfo:
        info = self.engine.member_info()
        info.role, info.address, info.store_id = control_pb2.ROLE_DECODE, self.address, self.store.client.store_id
        return info
