"""What an instance has to prefill, in the worker's own PrefillScheduler, and how much of it the conductor is told.

add ─► held, in their order    ─feed─► scheduler ─start─► its prefix is loaded ─► ready ─schedule─► chunks of a step ─end─► done
The scheduler is fed two steps ahead, and a prefix is looked up when its prefill starts: by then the queue before it is in the cache.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..prefill_worker.scheduler import PrefillScheduler, Step
from ..protocol.sampling import SamplingParams
from ..protocol.timing.chunk_sizer import Predicted
from ..protocol.timing.step_cost import ChunkWork, StepWork
from ..protocol.timing.turns import Turn, arrange
from ..proxy.conductor.backlog import QueuePlace
from ..proxy.conductor.predictors.cost_model import CostModel
from .clock import EventLoop
from .instance_options import InstanceOptions
from .job import Job
from .owner import Owner

MOST_ARRANGED = 256  # of those held: more would wait for long in any order
NO_SAMPLING = SamplingParams(max_tokens=1, ignore_eos=True)


class _Held(NamedTuple):
    order: tuple[int, int]  # queue_order, when it came
    place: QueuePlace
    job: Job


def _order(held: _Held) -> tuple[int, int]:
    return held.order


class PrefillQueue:
    """The queue of one process; a restarted process has a new one. on_ready: called when something new can be computed."""

    def __init__(self, allocator: PageAllocator, cost: CostModel, options: InstanceOptions, fit: Predicted, owner: Owner,
                 loop: EventLoop, on_ready: Callable[[], None]) -> None:  # fmt: skip
        self.scheduler = PrefillScheduler(allocator, options.page_size, max(options.max_tokens_per_step, options.page_size))
        self.jobs: dict[Sequence, Job] = {}  # in the scheduler
        self.num_left_tokens = 0  # of what was placed here and is not computed; before a prefix is looked up, as many as the proxy thinks
        self.num_fed_tokens = 0  # in the scheduler, cached ones included until their prefix is looked up
        self.num_ready = 0
        self._cost = cost
        self._options = options
        self._sizer = options.sizer
        self._fit = fit  # what the instance knows of its steps
        self._owner = owner
        self._loop = loop
        self._on_ready = on_ready
        self._held: list[_Held] = []  # by their places
        self._num_added = 0
        self._pace = 1.0  # times as long as alone, beside those who decode
        self._fresh: dict[Sequence, Job] = {}  # ready, and no chunk of them computed

    def add(self, job: Job, place: QueuePlace, num_cached: int = 0) -> None:
        """num_cached: tokens that are thought to be cached."""
        self._num_added += 1
        insort(self._held, _Held((place.queue_order, self._num_added), place, job), key=_order)
        job.num_expected_tokens = num_cached
        self.num_left_tokens += job.num_tokens - num_cached
        self.feed()

    def feed(self) -> None:
        """Two steps ahead, and whoever comes before all that the scheduler has."""
        for held, leads in self._next():
            if self.num_fed_tokens >= 2 * self._options.max_tokens_per_step and not leads:
                break
            self._held.remove(held)
            job, (queue_order, due_s, _) = held.job, held.place
            sequence = Sequence(
                str(job.index), range(job.num_tokens), job.num_tokens, NO_SAMPLING, queue_order=queue_order, due=due_s  # type: ignore[arg-type]
            )  # fmt: skip
            job.prefill_sequence = sequence
            self.jobs[sequence] = job
            self.num_fed_tokens += job.num_tokens
            self.scheduler.add(sequence)
            self._begin_loads()
        if self.scheduler.num_waiting:
            self._begin_loads()

    def _next(self) -> Iterator[tuple[_Held, bool]]:
        """Who is held, in the order in which they would be computed, and whether that is before all whom the scheduler has."""
        held, fed = self._held[:MOST_ARRANGED], list(self.jobs)
        if not held:
            return
        turns = [Turn(one.order, one.place.due_s, self._left_s(one.job.num_expected_tokens, one.job.num_tokens)) for one in held]
        for one in fed:
            turns.append(Turn((one.queue_order, 0), one.due, self._left_s(one.num_computed_tokens, one.num_tokens)))
        leads = True
        for index in arrange(turns, self._loop.now).order:
            leads = leads and index < len(held)
            if index < len(held):
                yield held[index], leads

    def _left_s(self, num_computed: int, num_tokens: int) -> float:
        """As StepBudget.left_s."""
        return self._pace * self._sizer.alone_s(self._fit, ChunkWork(num_computed, num_tokens - num_computed))

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
        """num_cached of its tokens need no computing: what was thought of it is put right by what was found."""
        self.num_left_tokens -= num_cached - job.num_expected_tokens
        job.num_expected_tokens = num_cached
        self.num_fed_tokens -= num_cached - job.num_cached_tokens
        job.num_cached_tokens = num_cached
        self.scheduler.ready(sequence, num_cached)

    def schedule(self, decodes: StepWork, target_s: float) -> Step | None:
        """The chunks that go into a step beside a decode batch; None where none does.

        Args:
            target_s: what the step may take.
        """
        for sequence, job in self._fresh.items():
            num_cached = self._owner.look_again(job)
            if num_cached > job.num_cached_tokens:
                self._recount(sequence, job, num_cached)
        self._pace = pace = self._sizer.pace(self._fit, decodes, target_s)
        self.scheduler.arrange(self._loop.now, lambda work: pace * self._sizer.alone_s(self._fit, work))
        budget = self._sizer.num_tokens(self._fit, decodes, target_s, self.scheduler.waiting_chunks)
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
            self._close(job)
            self._owner.prefill_done(job)

    def withdraw(self, job: Job) -> None:
        """Takes out one that is not to be finished here; one that is not here does nothing."""
        at = next((at for at, held in enumerate(self._held) if held.job is job), None)
        if at is not None:
            del self._held[at]
            self.num_left_tokens -= job.num_tokens - job.num_expected_tokens
            self._close(job)
            return
        sequence = job.prefill_sequence
        if sequence is None or self.jobs.pop(sequence, None) is None:
            return
        self._close(job)
        self._fresh.pop(sequence, None)
        self.num_ready -= any(entry.sequence is sequence and entry.runnable for entry in self.scheduler._started)
        self.num_left_tokens -= sequence.num_tokens - max(sequence.num_computed_tokens, job.num_expected_tokens)
        self.num_fed_tokens -= sequence.num_tokens - sequence.num_computed_tokens
        self.scheduler.abort(sequence)
        self.scheduler.release(sequence)

    def drop(self) -> None:
        """The process is dead: prefixes still on their way find nobody."""
        for job in [*self.jobs.values(), *(held[2] for held in self._held)]:
            self._close(job)
        self.jobs.clear()

    def _close(self, job: Job) -> None:
        """In the proxy's books."""
        if job.task is not None:
            job.task.end(self._loop.now)
            job.task = None
