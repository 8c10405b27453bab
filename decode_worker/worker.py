"""The decode half of a worker: takes in hand-offs, batches sequences continuously, streams tokens.

event loop     Decode ─► fetch ─► add ─► start ─► verify ─► admit ┐     ┌─► tokens ─► reply stream      finished ─► cache
                 └─ local prefill: ─► add ─► start ─► prefix ─► begin_prefill
step loop                                       schedule ─► compute ─► record
transfers                 slices into pages ────────────────┘                              pages ─► store ────────┘
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial

import grpc.aio

from ..engine.executor import PageTransfer
from ..engine.sequence import Sequence
from ..engine.worker import HalfLoad, Worker
from ..kvstore.client import StoreClient
from ..protocol.blocks import sent_or_made_keys
from ..protocol.config import DecodeConfig
from ..protocol.errors import (
    HalfmoonError,
    HandoffAborted,
    HandoffError,
    InternalError,
    RequestCancelled,
    StoreUnavailable,
    WorkerLost,
)
from ..protocol.roles import WorkerRole
from ..protocol.tasks import Tasks
from ..protocol.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from .answer_cacher import AnswerCacher
from .job import DecodeJob
from .loader import HandoffLoader
from .local_prefill import LocalPrefill, local_state
from .metrics import DecodeMetrics
from .scheduler import DecodeScheduler
from .service import DecodeService
from .step_samples import StepSamples
from .steps import DecodeSteps, StepResult
from .token_feed import TokenFeeds

logger = logging.getLogger(__name__)

CACHE_PATIENCE_S = 0.02  # about a step: how long an answer's end waits for its blocks to be cached


class DecodeHalf:
    """Lives on the worker's event loop, except its steps."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self.feeds = TokenFeeds()
        self._jobs: dict[Sequence, DecodeJob] = {}
        self._samples = StepSamples()
        self._intakes = Tasks("the decode half")

    def mount(self, worker: Worker) -> DecodeSteps:
        """Raises ConfigError."""
        facts, config = worker.facts, self._config
        self.scheduler = DecodeScheduler(
            worker.allocator,
            facts.page_size,
            eos_token_ids=facts.eos_token_ids,
            max_running=config.max_running,
            max_prefill_tokens_per_step=config.max_prefill_tokens_per_step,
        )
        self._worker = worker
        self._life = worker.life
        self._facts = facts
        self._changed = worker.changed
        self._pages: PageTransfer = worker.executor.pages
        self._metrics = DecodeMetrics(worker.metrics.registry)
        self._loader = HandoffLoader(self._pages, worker.stores, worker.metrics, facts.vocab_size)
        self._local = LocalPrefill(worker.prefixes)
        self._cacher = AnswerCacher(worker.blocks, worker.stores, self.scheduler, worker.changed)
        return DecodeSteps(self.scheduler, self._jobs, self._local, self._samples, worker.changed, worker.life.tell, self._stepped)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(DecodeService(self), server)

    def take_role(self, role: WorkerRole) -> None:
        """Does nothing: decode requests are served in every role."""

    def leave(self) -> None:
        self.feeds.drain()

    def load(self) -> HalfLoad:
        """Calls whose hand-off has not begun count as waiting too."""
        num_running = self.scheduler.num_running
        computing = (job.sequence for job in self._jobs.values() if job.is_local and job.state is None)
        return HalfLoad(
            num_running,
            len(self._jobs) - num_running,
            sum(sequence.num_tokens for sequence in self._jobs),
            sum(sequence.num_tokens - sequence.num_computed_tokens for sequence in computing),
            self._samples.take(),
        )

    def open(self, request: worker_pb2.DecodeRequest) -> DecodeJob:
        """Begins to wait for the hand-off, or to compute the prompt. The job gives the replies. close() must follow.

        Raises InvalidRequest, PromptTooLong, WorkerLost, or Unavailable for a token feed that is not open.
        """
        self._life.require_sound()
        sequence = Sequence.from_proto(request.sequence)
        sequence.check_tokens(self._facts.vocab_size)
        sequence.check_len(self._facts.max_model_len, with_answer=True)
        self.scheduler.check(sequence)
        root = sequence.root or self._worker.root
        keys = sent_or_made_keys(request.sequence.block_keys, root, sequence.token_ids, self._facts.page_size)
        sequence.block_keys = list(keys)
        if not request.local_prefill:
            sequence.num_prompt_logprobs = None  # whoever computes the prompt gives them
        loop = asyncio.get_running_loop()
        job = DecodeJob(request, sequence, keys, loop.create_future(), self.feeds.enter(request))
        job.timer = loop.call_later(max(sequence.remaining_s, 0.0), self._time_out, job)
        if not job.is_local:
            sequence.due = math.inf  # the prefill worker's matter
        self._jobs[sequence] = job
        work, what = self._prefill(job) if job.is_local else self._take_in(job), f"the intake of {sequence.request_id}"
        job.intake = self._intakes.spawn(work, what, partial(self._intake_broke, job))
        return job

    def close(self, job: DecodeJob) -> None:
        """Nobody reads the job any more. Frees all that it holds, unless it has ended. Idempotent."""
        job.leave_feed()
        self._fail(job, RequestCancelled(f"request {job.sequence.request_id} was cancelled in decode"))

    def stop_sequence(self, request_id: str) -> bool:
        """Ends a request as finished with the tokens it has, and caches its blocks. False if there is no such request."""
        found = [job for job in self._jobs.values() if job.sequence.request_id == request_id]
        for job in found:
            with self._changed:
                self.scheduler.finish(job.sequence)
            self._finish(job, common_pb2.FINISH_REASON_STOP)
        return bool(found)

    async def _take_in(self, job: DecodeJob) -> None:
        """From the fetch to the admission."""
        try:
            job.sequence.grammar = await self._worker.grammars.state_of(job.sequence.sampling)
            if job.ended:
                return
            await self._loader.open(job)
            if job.ended:
                return
            with self._changed:
                self.scheduler.add(job.sequence)
            self.start_waiting()
            state = await self._loader.load(job)
        except HalfmoonError as error:
            if isinstance(error, HandoffError) and not isinstance(error, HandoffAborted):
                logger.warning("request %s refused: %s", job.sequence.request_id, error)
                self._metrics.handoff_refused(error.code)
            self._fail(job, error)
            return
        if job.ended:
            return
        self._admit(job, state)
        self._loader.count(job)
        self._life.spawn(self._loader.release(job), f"releasing the hand-off of {job.sequence.request_id}")

    async def _prefill(self, job: DecodeJob) -> None:
        """For a local prefill: up to the point from which the engine's steps compute the prompt."""
        try:
            job.sequence.grammar = await self._worker.grammars.state_of(job.sequence.sampling)
        except HalfmoonError as error:
            self._fail(job, error)
        if job.ended:
            return
        with self._changed:
            self.scheduler.add(job.sequence)
        self.start_waiting()
        await job.started
        await self._local.load(job)
        if job.ended:
            return
        with self._changed:
            self.scheduler.begin_prefill(job.sequence, job.prefix.num_tokens)
            self._changed.notify()

    def _intake_broke(self, job: DecodeJob, bug: Exception) -> None:
        """A bug; it ends only this request."""
        self._fail(job, InternalError(f"{type(bug).__name__}: {bug}; the decode worker's log has the traceback"))

    def _admit(self, job: DecodeJob, state: common_pb2.HandoffState) -> None:
        with self._changed:
            reason = self.scheduler.admit(job.sequence, state.first_token.token_id)
            self._changed.notify()
        job.admit(state)
        if reason is not None:
            self._finish(job, reason)

    def start_waiting(self) -> None:
        with self._changed:
            started = self.scheduler.start()
            self._changed.notify()  # preempted sequences may run again
        for sequence in started:
            job = self._jobs.get(sequence)
            if job is not None and not job.started.done():
                job.started_at = time.monotonic()
                job.started.set_result(None)

    def _time_out(self, job: DecodeJob) -> None:
        self._fail(job, job.timeout_error())

    def store_lost(self, client: StoreClient) -> None:
        """Fails the jobs that still wait for a hand-off in it."""
        for job in list(self._jobs.values()):
            if job.client is client and not job.sealed_at:
                self._fail(job, StoreUnavailable(f"the KV store at {client.address} is gone; the hand-off with it", address=client.address))

    # ends

    def _finish(self, job: DecodeJob, reason: common_pb2.FinishReason) -> None:
        """The client learns of the end after the answer's blocks are cached, or after CACHE_PATIENCE_S if that comes first."""
        if not job.ended:
            job.finish_reason = reason
            self._end(job)
            asyncio.get_running_loop().call_later(CACHE_PATIENCE_S, job.let_finish)

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
        self._life.spawn(self._release(job), f"releasing {job.sequence.request_id}")

    async def _release(self, job: DecodeJob) -> None:
        """Caches the blocks, or aborts a hand-off that nobody takes. Frees the pages once no thread touches them."""
        if job.caching_prompt is not None:
            await asyncio.wait({job.caching_prompt})
        try:
            if job.state is None and not job.is_local:
                await self._loader.abort(job)
            elif job.finish_reason is not None:
                await self._cacher.cache_answer(job, job.sequence.root or self._worker.root)
        except HalfmoonError as failure:
            logger.info("request %s: after its end, %s", job.sequence.request_id, failure)
        finally:
            job.let_finish()
            await self._loader.end_intake(job)
            if job.state is None and job.reader is not None:  # what came of a hand-off that was given up may be no numbers
                with self._changed:
                    own = self._worker.allocator.own_pages(job.sequence)
                self._pages.scrub(own)
            await self._pages.drained()
            with self._changed:
                self.scheduler.release(job.sequence)
            self._worker.start_waiting()
        await self._loader.release(job)

    def _stepped(self, result: StepResult) -> None:
        self._worker.metrics.stepped("decode", result.seconds, result.work)
        self._metrics.preempted(len(result.preempted))
        for sequence in result.preempted:
            if sequence in self._jobs:
                self._local.preempted(self._jobs[sequence])
        for job, error in result.failed:
            if not job.ended:
                self._worker.metrics.failed("decode", error.code)
                error.fields["worker"] = self._worker.worker_id
                self._fail(job, error)
        for job, scored in result.prompt_logprobs:
            job.prompt_logprobs.append(scored)
            job.changed.set()
        for job, token, reason in result.outputs:
            if job.ended:
                continue
            if job.state is None:
                job.admit(local_state(job, token))
                if reason is None:
                    job.caching_prompt = self._life.spawn(self._cacher.cache_prompt(job), f"caching {job.sequence.request_id}")
            else:
                job.push(token)
            if reason is not None:
                self._finish(job, reason)
        self._worker.start_waiting()

    def fail_all(self, lost: Callable[[str], WorkerLost]) -> None:
        for job in list(self._jobs.values()):
            self._fail(job, lost(job.sequence.request_id))
