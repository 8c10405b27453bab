"""The prefill half of a worker: a queue of prompts, and the hand-offs that they are computed into.

event loop       Prefill ─► add ─► start ─► reserve, load prefix ─► ready ┐           ┌─► seal ─► reply
step loop                                             schedule ─► forward ─► record    │
transfers                                         prefixes in, finished layers out ───┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc.aio

from ..engine.executor import PageTransfer
from ..engine.model_flops import StepWork
from ..engine.sequence import Sequence
from ..engine.worker import HalfLoad, Worker
from ..kvstore.client import StoreClient
from ..protocol.blocks import div_ceil, sent_or_made_keys
from ..protocol.config import PrefillConfig
from ..protocol.errors import HalfmoonError, HandoffCorrupt, InternalError, RequestCancelled, StoreUnavailable, WorkerLost
from ..protocol.roles import WorkerRole
from ..protocol.tasks import beside
from ..protocol.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from .job import PrefillJob
from .pusher import push_prefix
from .scheduler import PrefillScheduler
from .service import Prefilled, PrefillService
from .steps import PrefillSteps

logger = logging.getLogger(__name__)


class PrefillHalf:
    """Lives on the worker's event loop, except its steps."""

    def __init__(self, config: PrefillConfig) -> None:
        self._config = config
        self._jobs: dict[Sequence, PrefillJob] = {}

    def mount(self, worker: Worker) -> PrefillSteps:
        """Raises ConfigError."""
        facts = worker.facts
        self.scheduler = PrefillScheduler(worker.allocator, facts.page_size, self._config.max_tokens_per_step)
        self._worker = worker
        self._life = worker.life
        self._facts = facts
        self._stores = worker.stores
        self._changed = worker.changed
        self._pages: PageTransfer = worker.executor.pages
        return PrefillSteps(self.scheduler, self._jobs, self._pages, worker.changed, worker.life.tell, self._stepped, self._failed)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(PrefillService(self), server)

    def take_role(self, role: WorkerRole) -> None:
        """In the role `both` it leaves pages to the decode half: room for one sequence of the model's length."""
        facts = self._facts
        room = min(div_ceil(facts.max_model_len, facts.page_size), facts.num_pages // 2)
        with self._changed:
            self.scheduler.num_reserved_pages = room if role == "both" else 0
        self.start_waiting()

    def load(self) -> HalfLoad:
        scheduler = self.scheduler
        return HalfLoad(scheduler.num_running, scheduler.num_waiting, 0, scheduler.num_outstanding_tokens, [])

    async def prefill(self, request: worker_pb2.PrefillRequest) -> Prefilled:
        """Computes the prompt's KV into the hand-off and samples the first token; returns once the hand-off is sealed.

        Cancelling it frees what it held. Any other error also reaches whoever waits for the hand-off.
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
            return Prefilled(state, job.prompt_logprobs)
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
        self._life.require_sound()
        sequence = Sequence.from_proto(request.sequence)
        sequence.check_tokens(self._facts.vocab_size)
        sequence.check_len(self._facts.max_model_len, with_answer=False)
        root = sequence.root or self._worker.root
        keys = sent_or_made_keys(request.sequence.block_keys, root, sequence.token_ids, self._facts.page_size)
        sequence.block_keys = list(keys)
        loop = asyncio.get_running_loop()
        self.scheduler.check(sequence)
        job = PrefillJob(request, sequence, keys, task, loop.create_future(), loop.create_future(), loop.create_future())
        self._jobs[sequence] = job
        return job

    async def _prefill(self, job: PrefillJob) -> common_pb2.HandoffState:
        job.sequence.grammar = await self._worker.grammars.state_of(job.sequence.sampling)
        with self._changed:
            self.scheduler.add(job.sequence)
        self.start_waiting()
        await job.started
        await self._prepare(job)
        assert job.client is not None and job.writer is not None
        if tail := job.sequence.num_tokens % self._facts.page_size:
            # another's KV must not travel in the rest of the last page; pushes come behind this
            self._pages.zero_tail(job.sequence.pages[-1], tail)
        push_prefix(self._pages, job)
        with self._changed:
            self.scheduler.ready(job.sequence, job.prefix.num_tokens)
            self._changed.notify()
        await job.computed
        await job.pushed
        await job.writer.seal(job.state())
        state = job.state()
        self._worker.metrics.transferred(job.client.transport, "push", job.writer.num_bytes, state.phases.push_s)
        return state

    async def _prepare(self, job: PrefillJob) -> None:
        """Loads the prefix and reserves room for the hand-off at the same time. No loaded block stays pinned while the reserve waits.

        Raises what the reserve raises, or HandoffCorrupt if the reserve counted on a block that the load found corrupt and dropped.
        """
        async with beside(self._load_prefix(job)) as loading, beside(self._reserve(job)) as reserving:
            await asyncio.gather(loading, reserving)
        assert job.writer is not None
        if job.prefix.corrupt_in is job.client and any(job.writer.present[block] for block in job.prefix.corrupt_blocks):
            raise HandoffCorrupt(
                f"cached blocks of {job.sequence.request_id} do not match their checksums and were dropped; the next attempt computes them"
            )

    async def _load_prefix(self, job: PrefillJob) -> None:
        request = job.request
        job.prefix = await self._worker.prefixes.load(
            job.sequence, job.block_keys, request.prefix, skip_own_store=request.skip_own_store, own_ssd=request.own_ssd
        )

    async def _reserve(self, job: PrefillJob) -> None:
        """Sets the job's client and writer."""
        client = await self._stores.attached(job.request.store_address)
        handoff = job.request.handoff
        num_blocks = div_ceil(job.sequence.num_tokens, self._facts.page_size)
        writer = await client.reserve(handoff.id, handoff.epoch, job.block_keys, num_blocks, job.sequence.remaining_s)
        job.client, job.writer = client, writer

    def _close(self, job: PrefillJob, error: HalfmoonError | None) -> None:
        job.closed = True
        with self._changed:
            self.scheduler.abort(job.sequence)
        del self._jobs[job.sequence]
        self._life.spawn(self._release(job, error), f"releasing {job.sequence.request_id}")

    async def _release(self, job: PrefillJob, error: HalfmoonError | None) -> None:
        """Aborts the hand-off after a failure, else caches the blocks. Frees the pages once no thread touches them."""
        try:
            if error is not None:
                await self._abort(job, error)
            elif not self._stores.is_own(job.request.store_address) and job.block_keys:
                await self._worker.blocks.cache(self._stores.own.client, job.block_keys, job.sequence.pages)
        except HalfmoonError as failure:
            logger.info("request %s: after its end, %s", job.sequence.request_id, failure)
        finally:
            await self._pages.drained()
            with self._changed:
                self.scheduler.release(job.sequence)
            self._worker.start_waiting()

    async def _abort(self, job: PrefillJob, error: HalfmoonError) -> None:
        if job.writer is not None:
            await job.writer.abort(error)
            return
        client = await self._stores.client(job.request.store_address)
        await client.abort(job.request.handoff.id, job.request.handoff.epoch, error)

    def start_waiting(self) -> None:
        if not self.scheduler.num_waiting:
            return
        with self._changed:
            started = self.scheduler.start()
        for sequence in started:
            job = self._jobs.get(sequence)
            if job is not None and not job.started.done():
                job.started.set_result(None)

    def store_lost(self, client: StoreClient) -> None:
        for job in list(self._jobs.values()):
            if job.client is client:
                job.fail(StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    def leave(self) -> None:
        """Does nothing: every stream belongs to one call."""

    def fail_all(self, lost: Callable[[str], WorkerLost]) -> None:
        for job in list(self._jobs.values()):
            job.fail(lost(job.sequence.request_id))

    def _stepped(self, seconds: float, work: StepWork) -> None:
        self._worker.metrics.stepped("prefill", seconds, work)
        self._worker.prefixes.computed(seconds / max(work.num_tokens, 1), work.num_tokens)
        self._worker.start_waiting()

    def _failed(self, job: PrefillJob, error: HalfmoonError) -> None:
        self._worker.metrics.failed("prefill", error.code)
        error.fields["worker"] = self._worker.worker_id  # decode may hear of it first, by the hand-off's abort
        job.fail(error)
