"""One instance on the virtual clock: the workers' own schedulers over a cost model, a node's cache and a network link.

prefill: PrefillQueue ─┐
                       ├─► step: prefill chunks + a decode token each ─► time by the cost model ─► next step
decode: DecodeJobs ────┘
A prefill instance has no decode batch, a decode instance no prefill queue; a coupled one has both, and so may one that changes roles.
Pages are one pool. Runs of equal decode steps are taken at once (DecodeBatch), and cut short where something comes in between.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from ..decode_worker.scheduler import Step as DecodeStep
from ..engine.page_allocator import PageAllocator
from ..prefill_worker.scheduler import Step as PrefillStep
from ..protocol.timing.step_cost import StepWork, attention_of
from ..protocol.timing.step_fit import StepFit
from ..proxy.conductor.backlog import Backlog, QueuePlace
from ..proxy.conductor.placement import MemberState
from ..proxy.conductor.predictors.cost_model import CostModel
from ..proxy.conductor.predictors.timing import Predictors
from .clock import EventLoop
from .decode_jobs import DecodeJobs
from .instance_options import InstanceOptions, Role
from .jitter import Jitter
from .job import Job
from .links import Link
from .node_cache import NodeCache
from .owner import Owner
from .page_prefixes import PagePrefixes
from .prefill_queue import PrefillQueue
from .processor import Processor

LEARNS_ALL, LEARNS_EVERY = 200, 8  # steps: the first ones, and then each so many; a worker learns from every one


class Instance:
    def __init__(self, name: str, role: Role, cost: CostModel, options: InstanceOptions, cache: NodeCache, loop: EventLoop, owner: Owner,
                 predictors: Predictors, on_change: Callable[[Instance], None], *, node: str, processor: Processor,
                 books: Backlog) -> None:  # fmt: skip
        self.name = name
        self.node = node  # the node whose store it reads and writes
        self.books = books  # what the proxy knows of its queue
        self.processor = processor
        self.role: Role = role
        self.incarnation = 1
        self.cost = cost
        self.options = options
        self.cache = cache
        self.egress, self.ingress = Link(cost.link_bytes_per_s), Link(cost.link_bytes_per_s)
        self.decode = DecodeJobs(name, owner)
        self.busy_s = 0.0
        self.prefill_s = 0.0  # seconds of steps that went to prefill chunks
        self.num_steps = 0
        self.down = False
        self._loop = loop
        self._owner = owner
        self._limits = options.limits
        self._predictors = predictors
        self._on_change = on_change
        self._jitter = Jitter(options.step_jitter, name)
        self._version = 0  # version of the step under way; an event of an older step is void
        self._reset()

    def _reset(self) -> None:
        options = self.options
        self.allocator = PageAllocator(self.cost.kv_capacity_tokens // options.page_size)
        self.fit = StepFit(options.knows)
        self.prefill = PrefillQueue(self.allocator, self.cost, options, self.fit, self._owner, self._loop, self.poke)
        self.pages = PagePrefixes(self.allocator, options.page_size, options.block_size)
        self.decode.reset(self.allocator, options.page_size, options.max_running, options.step_tpot_s)
        self._num_seen = 0
        self._ending = False
        self._step: tuple[PrefillStep | None, DecodeStep | None] | None = None
        self._step_start_s = 0.0
        self._step_end_s = 0.0
        self._equal_ends: list[float] = []  # when each of the equal steps under way ends

    # what comes in

    def add_prefill(self, job: Job, place: QueuePlace, num_cached: int) -> None:
        """num_cached: tokens that the proxy thinks are cached."""
        job.task = self.books.place(job.num_tokens - num_cached, job.predicted_prefill_s, place, self._loop.now)
        self.prefill.add(job, place, num_cached)
        self._on_change(self)
        self.poke()

    def withdraw(self, job: Job) -> None:
        """Takes a prefill out that is not to be finished here."""
        self.prefill.withdraw(job)
        self._on_change(self)

    def promise(self, job: Job, num_tokens: int) -> None:
        """It will decode here."""
        self.decode.promise(job, num_tokens)
        self._on_change(self)

    def unpromise(self, job: Job) -> None:
        self.decode.unpromise(job)
        self._on_change(self)

    def add_decode(self, job: Job) -> None:
        """Its hand-off is here, whole."""
        self.decode.add(job)
        if self._step is None and not self._ending:  # else at the end of the step
            self.decode.start(self._loop.now)
        self._on_change(self)
        self.poke()

    # steps

    def poke(self) -> None:
        """Something came in: the next step begins, or the run of equal steps under way ends with its present step."""
        if self.down or self._ending:
            return
        if self._step is None:
            self._begin()
        elif self._equal_ends and self._equal_ends[-1] != self._step_end_s_of_now():
            self._cut()

    def _step_end_s_of_now(self) -> float:
        ends = self._equal_ends
        return ends[min(bisect_right(ends, self._loop.now), len(ends) - 1)]

    def _cut(self) -> None:
        ends = self._equal_ends
        at = min(bisect_right(ends, self._loop.now), len(ends) - 1)
        if at:
            self._count(ends[:at])
        self._equal_ends = [ends[at]]
        self._schedule_end(ends[at])

    def stretch(self, factor: float) -> None:
        """See Processor. A run of equal steps ends with its present step: the next ones are made anew."""
        if self._step is None:
            return
        if self._equal_ends:
            self._cut()
        now = self._loop.now
        moment = now + (self._step_end_s - now) * factor
        if self._equal_ends:
            self._equal_ends = [moment]
        self._schedule_end(moment)

    def _schedule_end(self, moment: float) -> None:
        self._version += 1
        self._step_end_s = moment
        self._loop.at(moment, self._end, self._version)

    def _begin(self) -> None:
        """The next step, if there is something to do."""
        batch = self.decode.batch
        now = self._step_start_s = self._loop.now
        whole = batch.prepare() if batch.has_work else None
        decodes, own_chunks = StepWork(num_decodes=batch.num_batch, num_context_tokens=batch.num_kv_tokens), []
        if whole is not None:
            decodes, own_chunks = _parts(whole)
        elif batch.num_batch:
            self.decode.open_runs()
        prefill = None
        if self.prefill.num_ready:
            prefill = self.prefill.schedule(decodes, self.decode.target_s(now) if decodes.num_decodes else math.inf)
        if prefill is None and whole is None and not decodes.num_decodes:
            self.processor.leave(self)
            return
        self.processor.enter(self)
        slow = self.processor.slowdown
        self._step = (prefill, whole)
        chunks = own_chunks + [(chunk.num_tokens, chunk.start) for chunk in prefill.chunks] if prefill else own_chunks
        num_decodes, num_context_tokens = decodes.num_decodes, decodes.num_context_tokens
        step_s = self.cost.mixed_time(chunks, num_decodes, num_context_tokens)
        took_s = step_s * slow * self._jitter.next()
        if self.options.learn:
            self._learn(chunks, decodes, took_s)
        if prefill is None and whole is None:
            self._equal_ends = self._equal(now, took_s, step_s * slow, slow)
            self._schedule_end(self._equal_ends[-1])
            return
        self._schedule_end(now + took_s)
        if prefill:
            prefill_s = step_s - (self.cost.mixed_time(own_chunks, num_decodes, num_context_tokens) if own_chunks or num_decodes else 0.0)
            self.prefill_s += prefill_s
            self.prefill.begin(prefill, prefill_s)
            self._on_change(self)

    def _learn(self, chunks: list[tuple[int, int]], decodes: StepWork, seconds: float) -> None:
        self._num_seen += 1
        if self._num_seen > LEARNS_ALL and self._num_seen % LEARNS_EVERY:
            return
        num_tokens, attention = sum(new for new, _ in chunks), sum(attention_of(new, prefix) for new, prefix in chunks)
        work = decodes._replace(num_chunk_tokens=num_tokens, attention=attention)
        self.fit.observe(work, seconds)
        if work.num_decodes:
            self._predictors.step.observe(work, seconds)

    def _equal(self, now: float, took_s: float, step_s: float, slow: float) -> list[float]:
        """took_s: of the first, which is step_s but for jitter."""
        ends: list[float] = []
        more_s = self.decode.batch.num_batch * self.cost.per_kv_token_s * slow
        jitter = self._jitter
        for _ in range(self.decode.batch.num_same_steps()):
            now += took_s
            ends.append(now)
            step_s += more_s
            took_s = step_s * jitter.next() if jitter.deviation else step_s
        return ends

    def _end(self, version: int) -> None:
        if version != self._version or self._step is None:
            return
        prefill, whole = self._step
        self._step, self._ending = None, True
        now = self._loop.now
        if self._equal_ends:
            ends, self._equal_ends = self._equal_ends, []
            self._count(ends)
        else:
            self.num_steps += 1
            self.busy_s += now - self._step_start_s
            if whole is not None:
                self.decode.end_whole(whole, now)
            elif self.decode.batch.num_batch:
                self.decode.count([now])
        if prefill is not None:
            self.prefill.end(prefill, self._step_start_s)
        self.decode.start(now)
        self.prefill.feed()
        self._ending = False
        self._on_change(self)
        self._begin()

    def _count(self, ends: list[float]) -> None:
        self.num_steps += len(ends)
        self.busy_s += ends[-1] - self._step_start_s
        self._step_start_s = ends[-1]
        self.decode.count(ends)

    # what others see

    def state(self) -> MemberState:
        jobs, batch, prefill = self.decode, self.decode.batch, self.prefill
        num_running = len(jobs.jobs)
        num_kv_tokens = batch.num_kv_tokens if batch.num_batch == num_running else batch.num_outstanding_tokens
        num_context_tokens = num_kv_tokens + jobs.num_promised_tokens
        return MemberState(
            id=self.name,
            incarnation=f"{self.name}#{self.incarnation}",
            store_address=self.node,
            num_outstanding_tokens=prefill.num_left_tokens if self.role == "prefill" else num_context_tokens,
            kv_capacity_tokens=self.cost.kv_capacity_tokens,
            num_requests=num_running + len(jobs.promised),
            num_running=num_running,
            num_running_tokens=num_kv_tokens,
            role=self.role,
            limits=self._limits,
        )

    def report(self) -> None:
        """To the proxy's books. Nothing that was placed is on its way any more: it is told of twice."""
        for _ in range(2):
            self.books.assigned.report(self.prefill.num_left_tokens)
        self.books.report(self._loop.now)

    # failures

    def kill(self) -> None:
        """The process dies with all it has, but for the tokens that were sent."""
        at = bisect_right(self._equal_ends, self._loop.now)
        if at:
            self._count(self._equal_ends[:at])
        self.decode.close_runs()
        self.prefill.drop()
        self.down = True
        self.processor.leave(self)
        self.incarnation += 1
        self._version += 1
        self._reset()

    def revive(self) -> None:
        self.down = False
        self._on_change(self)


def _parts(step: DecodeStep) -> tuple[StepWork, list[tuple[int, int]]]:
    """Its decode tokens, and what it recomputes as (tokens, tokens before them)."""
    decoding = [chunk for chunk in step.chunks if chunk.num_tokens == 1]
    recomputed = [(chunk.num_tokens, chunk.start) for chunk in step.chunks if chunk.num_tokens > 1]
    return StepWork(num_decodes=len(decoding), num_context_tokens=sum(chunk.start + 1 for chunk in decoding)), recomputed
