"""What an instance has to prefill, in the worker's own PrefillScheduler, and how much of it the conductor is told.

add ─► held, most urgent first ─feed─► scheduler ─start─► its prefix is loaded ─► ready ─schedule─► chunks of a step ─end─► done
The scheduler is fed two steps ahead, and a prefix is looked up when its prefill starts: by then the queue before it is in the cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..prefill_worker.scheduler import PrefillScheduler, Step
from ..protocol.sampling import SamplingParams
from ..protocol.timing.chunk_sizer import Predicted
from ..protocol.timing.step_cost import StepWork
from ..proxy.conductor.predictors.cost_model import CostModel
from ..proxy.conductor.predictors.timing import Predictors
from .clock import EventLoop
from .instance_options import InstanceOptions
from .job import Job
from .owner import Owner

NEVER = 2**62  # no priority is less urgent
NO_SAMPLING = SamplingParams(max_tokens=1, ignore_eos=True)


class PrefillQueue:
    """The queue of one process; a restarted process has a new one. on_ready: called when something new can be computed."""

    def __init__(self, allocator: PageAllocator, cost: CostModel, options: InstanceOptions, predictors: Predictors, owner: Owner,
                 loop: EventLoop, on_ready: Callable[[], None]) -> None:  # fmt: skip
        self.scheduler = PrefillScheduler(allocator, options.page_size, max(options.max_tokens_per_step, options.page_size))
        self.jobs: dict[Sequence, Job] = {}  # in the scheduler
        self.queued_s = 0.0  # predicted, of what was placed here and is not computed
        self.num_left_tokens = 0  # the same in tokens; and of those
        self.num_fed_tokens = 0  # in the scheduler
        self.num_ready = 0
        self._cost = cost
        self._options = options
        self._sizer = options.sizer
        self._predictors = predictors
        self._owner = owner
        self._loop = loop
        self._on_ready = on_ready
        self._held: list[tuple[int, int, Job]] = []
        self._num_added = 0
        self._most_urgent_fed = NEVER
        self._fresh: dict[Sequence, Job] = {}  # ready, and no chunk of them computed

    def add(self, job: Job, queue_order: int) -> None:
        """queue_order: the queue's order, lower first."""
        self._num_added += 1
        heapq.heappush(self._held, (queue_order, self._num_added, job))
        self.queued_s += job.predicted_prefill_s
        self.num_left_tokens += job.num_tokens
        self.feed()

    def feed(self) -> None:
        """Two steps ahead, and whoever is more urgent than all that the scheduler has."""
        while self._held:
            queue_order, _, job = self._held[0]
            if self.num_fed_tokens >= 2 * self._options.max_tokens_per_step and queue_order >= self._most_urgent_fed:
                break
            heapq.heappop(self._held)
            sequence = Sequence(str(job.index), range(job.num_tokens), job.num_tokens, NO_SAMPLING, queue_order=queue_order)  # type: ignore[arg-type]
            job.prefill_sequence = sequence
            self.jobs[sequence] = job
            self.num_fed_tokens += job.num_tokens
            self._most_urgent_fed = min(self._most_urgent_fed, queue_order)
            self.scheduler.add(sequence)
            self._begin_loads()
        if self.scheduler.num_waiting:
            self._begin_loads()

    def _begin_loads(self) -> None:
        for sequence in self.scheduler.start():
            job = self.jobs[sequence]
            num_cached, ready_s = self._owner.load_prefix(job)
            job.num_cached_tokens = num_cached
            if ready_s <= self._loop.now:
                self._ready(sequence)
            else:
                self._loop.at(ready_s, self._ready, sequence)

    def _ready(self, sequence: Sequence) -> None:
        job = self.jobs.get(sequence)
        if job is None:  # withdrawn, or the process is dead
            return
        num_cached, job.num_cached_tokens = job.num_cached_tokens, 0
        self._recount(sequence, job, num_cached)
        self._fresh[sequence] = job
        self.num_ready += 1
        self._on_ready()

    def _recount(self, sequence: Sequence, job: Job, num_cached: int) -> None:
        """num_cached of its tokens need no computing: what the conductor thought of it is put right by what was found."""
        predicted_s = self._predictors.prefill.predict(job.num_tokens - num_cached, num_cached)
        self.queued_s = max(self.queued_s + predicted_s - job.predicted_prefill_s, 0.0)
        job.predicted_prefill_s = predicted_s
        self.num_left_tokens -= num_cached - job.num_cached_tokens
        self.num_fed_tokens -= num_cached - job.num_cached_tokens
        job.num_cached_tokens = num_cached
        self.scheduler.ready(sequence, num_cached)

    def schedule(self, cost: Predicted, decodes: StepWork, target_s: float) -> Step | None:
        """The chunks that go into a step beside a decode batch; None where none does.

        Args:
            cost: as the instance knows it.
            target_s: what the step may take.
        """
        for sequence, job in self._fresh.items():
            num_cached = self._owner.look_again(job)
            if num_cached > job.num_cached_tokens:
                self._recount(sequence, job, num_cached)
        budget = self._sizer.num_tokens(cost, decodes, target_s, self.scheduler.waiting_chunks)
        # who decodes his own prompt has chunks of any size, as in DecodeScheduler; blocks for another are pushed whole
        self.scheduler.chunk_alignment = 1 if decodes.num_decodes else self._options.page_size
        step = self.scheduler.schedule(budget)
        for chunk in step.chunks:
            self._fresh.pop(chunk.sequence, None)
        return step if step.chunks else None

    def begin(self, step: Step, seconds: float) -> None:
        """The step's chunks are computed from now on. seconds: of the step, without what its decode batch takes alone.

        Each has of them what its tokens, its attention and its part of what every step costs would take in a step of chunks alone.
        """
        cost, num_tokens = self._cost, step.num_tokens
        alone = [cost.prefill_time(chunk.num_tokens, chunk.start) for chunk in step.chunks]
        alone = [each - cost.prefill_s * (1.0 - chunk.num_tokens / num_tokens) for each, chunk in zip(alone, step.chunks, strict=True)]
        part = seconds / sum(alone)
        for chunk, each in zip(step.chunks, alone, strict=True):
            job = self.jobs[chunk.sequence]
            chunk_s = each * part
            job.prefill_cost_s += chunk_s
            job.attempt_cost_s += chunk_s
            if job.prefill_start_s < 0:
                job.prefill_start_s = self._loop.now
                self._owner.prefill_started(job)

    def computing(self, seconds: float) -> None:
        """So much of what was queued is in a step now."""
        self.queued_s = max(self.queued_s - seconds, 0.0)

    def end(self, step: Step, start_s: float) -> None:
        """The step that began at start_s is done."""
        for chunk in step.chunks:
            job = self.jobs.get(chunk.sequence)
            if job is not None:
                self.num_left_tokens -= chunk.num_tokens
                self.num_fed_tokens -= chunk.num_tokens
                self._owner.chunk_done(job, chunk.num_tokens, start_s)
        for sequence in self.scheduler.record(step):
            job = self.jobs.pop(sequence)
            self.scheduler.release(sequence)
            self.num_ready -= 1
            self.queued_s = max(self.queued_s - job.predicted_prefill_s + job.attempt_cost_s, 0.0)
            self._owner.prefill_done(job)
        self._most_urgent_fed = min((sequence.queue_order for sequence in self.jobs), default=NEVER)
        if not self.jobs and not self._held:
            self.queued_s = 0.0  # what rounding left

    def withdraw(self, job: Job) -> None:
        """Takes out one that is not to be finished here; one that is not here does nothing."""
        at = next((at for at, held in enumerate(self._held) if held[2] is job), None)
        if at is not None:
            del self._held[at]
            heapq.heapify(self._held)
            self.num_left_tokens -= job.num_tokens
            self.computing(job.predicted_prefill_s)
            return
        sequence = job.prefill_sequence
        if sequence is None or self.jobs.pop(sequence, None) is None:
            return
        self._fresh.pop(sequence, None)
        self.num_ready -= any(entry.sequence is sequence and entry.runnable for entry in self.scheduler._started)
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        self.num_left_tokens -= num_left
        self.num_fed_tokens -= num_left
        self.scheduler.abort(sequence)
        self.scheduler.release(sequence)

    def drop(self) -> None:
        """The process is dead: prefixes still on their way find nobody."""
        self.jobs.clear()
