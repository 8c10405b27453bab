"""One instance on the virtual clock: the workers' own schedulers over a cost model, a node's cache and a network link.

prefill queue ─ PrefillScheduler ─┐
                                  ├─► step: prefill chunks + a decode token each ─► time by the cost model ─► next step
hand-offs ─────── DecodeBatch ────┘
A prefill instance has no decode batch, a decode instance no prefill queue; a coupled one has both, and so may one that changes roles.
Pages are one pool. Runs of equal decode steps are taken at once (DecodeBatch), and cut short where something comes in between.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from ..decode_worker.scheduler import Step as DecodeStep
from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..prefill_worker.scheduler import PrefillScheduler
from ..prefill_worker.scheduler import Step as PrefillStep
from ..protocol.sampling import SamplingParams
from ..proxy.placement import MemberState
from ..proxy.predictors.cost_model import CostModel
from ..proxy.predictors.timing import Predictors
from .clock import EventLoop
from .decode_batch import DecodeBatch, decode_sequence
from .job import Job
from .links import Link
from .node_cache import NodeCache

Role = Literal["prefill", "decode", "coupled"]
STARVED_STEPS = 40  # without a chunk; then one goes in whatever the step takes. Under a tenth of the steps, which is what TBT looks at
NEVER = 2**62  # no priority is less urgent
NO_SAMPLING = SamplingParams(max_tokens=1, ignore_eos=True)


class Owner(Protocol):
    """What an instance tells the cluster. Every call comes at the clock's now."""

    def prefill_started(self, job: Job) -> None: ...
    def chunk_done(self, job: Job, num_tokens: int, start_s: float) -> None: ...
    def prefill_done(self, job: Job) -> None: ...
    def decode_started(self, job: Job) -> None: ...
    def decode_done(self, job: Job) -> None: ...
    def load_prefix(self, job: Job) -> tuple[int, float]:
        """Cached tokens, and when they stand in the pages."""
        ...

    def look_again(self, job: Job) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    page_size: int = 128
    """Tokens; a chunk ends at a page's end."""
    max_tokens_per_step: int = 2048
    """Prefill budget of a step without a decode batch."""
    mixed_tokens_per_step: int = 512
    """Prefill budget of a step with one: the chunk size of a coupled instance."""
    step_target_s: float = 0.0
    """Above 0: the budget of a mixed step is what fits under it, and mixed_tokens_per_step is not used."""
    max_running: int = 512
    learn: bool = False
    """Predictors are told what steps took."""


class Instance:
    def __init__(self, name: str, role: Role, cost: CostModel, options: InstanceOptions, cache: NodeCache, loop: EventLoop,
                 owner: Owner, predictors: Predictors, on_change: Callable[[Instance], None]) -> None:  # fmt: skip
        self.name = name
        self.role: Role = role
        self.incarnation = 1
        self.cost = cost
        self.options = options
        self.cache = cache
        self.egress, self.ingress = Link(cost.link_bytes_per_s), Link(cost.link_bytes_per_s)
        self._loop = loop
        self._owner = owner
        self._predictors = predictors
        self._on_change = on_change
        self.step_ends: list[float] = []  # of every step that gave decode tokens
        self.busy_s = 0.0
        self.prefill_s = 0.0  # seconds of steps that went to prefill chunks
        self.num_steps = 0
        self.down = False
        self.promised: dict[Job, int] = {}  # jobs that will decode here -> tokens
        self.num_promised_tokens = 0
        self._reset()

    def _reset(self) -> None:
        options, cost = self.options, self.cost
        self.allocator = PageAllocator(cost.kv_capacity_tokens // options.page_size)
        self.prefill = PrefillScheduler(self.allocator, options.page_size, max(options.max_tokens_per_step, options.page_size))
        self.decode = DecodeBatch(self.allocator, options.page_size, max_running=options.max_running)
        self.prefill_jobs: dict[Sequence, Job] = {}
        self.decode_jobs: dict[Sequence, Job] = {}
        self.queued_s = 0.0  # predicted seconds of prefill placed here and not computed
        self._open: dict[Sequence, int] = {}  # decoding -> first of its present run of steps
        self._num_ready = 0
        self._skipped = 0  # mixed steps in a row that had no room for a chunk
        self.num_left_tokens = 0  # of prefills placed here; and of those
        self.num_fed_tokens = 0  # in the scheduler
        self._held: list[tuple[int, int, Job]] = []  # the others, most urgent first
        self._num_added = 0
        self._most_urgent_fed = NEVER
        self._fresh: dict[Sequence, Job] = {}  # ready, and no chunk of them computed
        self._ending = False
        self._step: tuple[PrefillStep | None, DecodeStep | None] | None = None
        self._step_start_s = 0.0
        self._step_end_s = 0.0
        self._equal_ends: list[float] = []  # of the equal steps under way
        self._version = 0  # of the step under way; an event of an older one is void

    # prefill

    def add_prefill(self, job: Job, priority: int) -> None:
        """priority: the queue's order, lower first."""
        self._num_added += 1
        heapq.heappush(self._held, (priority, self._num_added, job))
        self.queued_s += job.predicted_prefill_s
        self.num_left_tokens += job.num_tokens
        self._start_prefills()
        self._on_change(self)
        self.poke()

    def _start_prefills(self) -> None:
        """Feeds the scheduler two steps ahead, and whoever is more urgent than all that it has.

        A prefix is looked up when a prefill starts: what the queue before it computes is in the cache by then.
        """
        while self._held:
            priority, _, job = self._held[0]
            num_fed = self.num_fed_tokens
            if num_fed >= 2 * self.options.max_tokens_per_step and priority >= self._most_urgent_fed:
                break
            heapq.heappop(self._held)
            sequence = Sequence(str(job.index), range(job.num_tokens), job.num_tokens, NO_SAMPLING, priority=priority)  # type: ignore[arg-type]
            job.prefill_sequence = sequence
            self.prefill_jobs[sequence] = job
            self.num_fed_tokens += job.num_tokens
            self._most_urgent_fed = min(self._most_urgent_fed, priority)
            self.prefill.add(sequence)
            self._begin_loads()
        if self.prefill.num_waiting:
            self._begin_loads()

    def _begin_loads(self) -> None:
        for sequence in self.prefill.start():
            job = self.prefill_jobs[sequence]
            num_cached, ready_s = self._owner.load_prefix(job)
            job.num_cached_tokens = num_cached
            if ready_s <= self._loop.now:
                self._ready(sequence, self.incarnation)
            else:
                self._loop.at(ready_s, self._ready, sequence, self.incarnation)

    def _ready(self, sequence: Sequence, incarnation: int) -> None:
        job = self.prefill_jobs.get(sequence)
        if job is None or incarnation != self.incarnation:
            return
        num_cached, job.num_cached_tokens = job.num_cached_tokens, 0
        self._recount(sequence, job, num_cached)
        self._fresh[sequence] = job
        self._num_ready += 1
        self.poke()

    def _recount(self, sequence: Sequence, job: Job, num_cached: int) -> None:
        """num_cached of its tokens need no computing: what the conductor thought of it is put right by what was found."""
        predicted_s = self._predictors.prefill.predict(job.num_tokens - num_cached, num_cached)
        self.queued_s = max(self.queued_s + predicted_s - job.predicted_prefill_s, 0.0)
        job.predicted_prefill_s = predicted_s
        self.num_left_tokens -= num_cached - job.num_cached_tokens
        self.num_fed_tokens -= num_cached - job.num_cached_tokens
        job.num_cached_tokens = num_cached
        self.prefill.ready(sequence, num_cached)

    # decode

    def promise(self, job: Job, num_tokens: int) -> None:
        self.promised[job] = num_tokens
        self.num_promised_tokens += num_tokens
        self._on_change(self)

    def unpromise(self, job: Job) -> None:
        self.num_promised_tokens -= self.promised.pop(job, 0)
        self._on_change(self)

    def add_decode(self, job: Job) -> None:
        """Its hand-off is here, whole."""
        self.unpromise(job)
        request = job.request
        sequence = decode_sequence(
            str(job.index), request.num_input_tokens, job.num_tokens, request.num_output_tokens, 0, self.decode.steps
        )
        job.decode_sequence = sequence
        self.decode_jobs[sequence] = job
        self.decode.add(sequence)
        if self._step is None and not self._ending:  # else at the end of the step: pages are written between steps
            self._start_decodes()
        self._on_change(self)
        self.poke()

    def _start_decodes(self) -> None:
        while self.decode.num_waiting:
            started = self.decode.start()
            if not started:
                return
            for sequence in started:
                job = self.decode_jobs[sequence]
                self._owner.decode_started(job)
                if self.decode.join(sequence):
                    self._ended(sequence)

    def _ended(self, sequence: Sequence) -> None:
        job = self.decode_jobs.pop(sequence)
        self.decode.release(sequence)
        self._close_run(sequence, job, len(self.step_ends))
        self._owner.decode_done(job)

    def _close_run(self, sequence: Sequence, job: Job, end: int) -> None:
        first = self._open.pop(sequence, end)
        if end > first:
            job.token_runs.append((self, first, end))

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

    def _schedule_end(self, moment: float) -> None:
        self._version += 1
        self._step_end_s = moment
        self._loop.at(moment, self._end, self._version)

    def _begin(self) -> None:
        """The next step, if there is something to do."""
        whole = self.decode.prepare() if self.decode.has_work else None
        batch_s, num_decoding = 0.0, 0
        if whole is not None:
            batch_s, num_decoding = self._whole_step_s(whole)
        elif self.decode.num_batch:
            num_decoding = self.decode.num_batch
            batch_s = self.cost.step_time(num_decoding, self.decode.num_kv_tokens)
            if len(self._open) != num_decoding:
                self._open_runs()
        prefill = self._schedule_prefill(batch_s, num_decoding) if self._num_ready else None
        now = self._step_start_s = self._loop.now
        if prefill is None and whole is None:
            if not num_decoding:
                return
            self._step = (None, None)
            self._equal_ends = self._equal(now, batch_s)
            if self.options.learn:
                self._predictors.step.observe(num_decoding, self.decode.num_kv_tokens, self._equal_ends[0] - now)
            self._schedule_end(self._equal_ends[-1])
            return
        prefill_s = sum(self.cost.prefill_time(chunk.num_tokens, chunk.start) for chunk in prefill.chunks) if prefill else 0.0
        self._step = (prefill, whole)
        self.prefill_s += prefill_s
        if prefill:
            for chunk in prefill.chunks:
                job = self.prefill_jobs[chunk.sequence]
                chunk_s = self.cost.prefill_time(chunk.num_tokens, chunk.start)
                job.prefill_cost_s += chunk_s
                job.attempt_cost_s += chunk_s
                if job.prefill_start_s < 0:
                    job.prefill_start_s = now
                    self._owner.prefill_started(job)
        self._schedule_end(now + batch_s + prefill_s)
        if prefill:
            self.queued_s = max(self.queued_s - prefill_s, 0.0)
            self._on_change(self)

    def _equal(self, now: float, first_s: float) -> list[float]:
        ends: list[float] = []
        more_s = self.decode.num_batch * self.cost.per_kv_token_s
        for _ in range(self.decode.num_same_steps()):
            now += first_s
            ends.append(now)
            first_s += more_s
        return ends

    def _whole_step_s(self, step: DecodeStep) -> tuple[float, int]:
        decoding = [chunk for chunk in step.chunks if chunk.num_tokens == 1]
        recomputed_s = sum(self.cost.prefill_time(chunk.num_tokens, chunk.start) for chunk in step.chunks if chunk.num_tokens > 1)
        if not decoding:
            return recomputed_s, 0
        return recomputed_s + self.cost.step_time(len(decoding), sum(chunk.start + 1 for chunk in decoding)), len(decoding)

    def _schedule_prefill(self, batch_s: float, num_decoding: int) -> PrefillStep | None:
        options = self.options
        budget = options.max_tokens_per_step
        if num_decoding:
            budget = options.mixed_tokens_per_step if options.step_target_s <= 0 else self._fitting_tokens(options.step_target_s - batch_s)
            if budget < options.page_size:
                self._skipped += 1
                return None
            self._skipped = 0
        for sequence, job in self._fresh.items():
            num_cached = self._owner.look_again(job)
            if num_cached > job.num_cached_tokens:
                self._recount(sequence, job, num_cached)
        self.prefill.max_tokens_per_step = budget
        step = self.prefill.schedule()
        for chunk in step.chunks:
            self._fresh.pop(chunk.sequence, None)
        return step if step.chunks else None

    def _fitting_tokens(self, left_s: float) -> int:
        """Prefill tokens that fit into the rest of a step; a page now and then where nothing fits, lest a prefill starves."""
        first = next((entry.sequence for entry in self.prefill._started if entry.runnable), None)
        found = self._predictors.prefill.tokens_within(left_s, first.num_computed_tokens) if first is not None else 0
        page = self.options.page_size
        return max(found // page * page, page if self._skipped >= STARVED_STEPS else 0)

    def _end(self, version: int) -> None:
        if version != self._version or self._step is None:
            return
        prefill, whole = self._step
        self._step, self._ending = None, True
        if self._equal_ends:
            ends, self._equal_ends = self._equal_ends, []
            self._count(ends)
        elif whole is not None:
            self.busy_s += self._loop.now - self._step_start_s
            self._end_whole(whole)
        else:
            self.num_steps += 1
            self.busy_s += self._loop.now - self._step_start_s
            if self.decode.num_batch:
                self.step_ends.append(self._loop.now)
                self._finish(self.decode.count(1))
        if prefill is not None:
            self._end_prefill(prefill)
        self._start_decodes()
        self._start_prefills()
        self._ending = False
        self._on_change(self)
        self._begin()

    def _count(self, ends: list[float]) -> None:
        self.num_steps += len(ends)
        self.busy_s += ends[-1] - self._step_start_s
        self._step_start_s = ends[-1]
        self.step_ends.extend(ends)
        self._finish(self.decode.count(len(ends)))

    def _finish(self, finished: list[Sequence]) -> None:
        for sequence in finished:
            self._ended(sequence)

    def _open_runs(self) -> None:
        at = len(self.step_ends)
        for sequence in self.decode_sequences():
            if sequence not in self._open:
                self._open[sequence] = at

    def decode_sequences(self) -> list[Sequence]:
        return list(self.decode._batch)

    def _end_whole(self, step: DecodeStep) -> None:
        at = len(self.step_ends)
        ended = self.decode.end_whole(step)
        self.num_steps += 1
        self.step_ends.append(self._loop.now)
        for sequence in [one for one in self._open if one not in ended.got_token]:
            self._close_run(sequence, self.decode_jobs[sequence], at)
        for sequence in ended.got_token:
            self._open.setdefault(sequence, at)
        self._finish(ended.finished)

    def _end_prefill(self, step: PrefillStep) -> None:
        for chunk in step.chunks:
            job = self.prefill_jobs.get(chunk.sequence)
            if job is not None:
                self.num_left_tokens -= chunk.num_tokens
                self.num_fed_tokens -= chunk.num_tokens
                self._owner.chunk_done(job, chunk.num_tokens, self._step_start_s)
        for sequence in self.prefill.record(step):
            job = self.prefill_jobs.pop(sequence)
            self.prefill.release(sequence)
            self._num_ready -= 1
            self.queued_s = max(self.queued_s - job.predicted_prefill_s + job.attempt_cost_s, 0.0)
            self._owner.prefill_done(job)
        self._most_urgent_fed = min((sequence.priority for sequence in self.prefill_jobs), default=NEVER)
        if not self.prefill_jobs and not self._held:
            self.queued_s = 0.0  # what rounding left

    # what others see

    def state(self) -> MemberState:
        decode, now = self.decode, self._loop.now
        num_running = len(self.decode_jobs)
        num_kv_tokens = decode.num_kv_tokens if decode.num_batch == num_running else decode.num_outstanding_tokens
        busy_until_s = 0.0
        if self._step is not None and self._step[0] is not None:
            busy_until_s = self._step_end_s
        if self.queued_s > 0:
            busy_until_s = max(busy_until_s, now) + self.queued_s * self._slowdown()
        num_context_tokens = num_kv_tokens + self.num_promised_tokens
        return MemberState(
            id=self.name,
            incarnation=f"{self.name}#{self.incarnation}",
            store_address=self.name,
            num_outstanding_tokens=num_context_tokens if self.role == "decode" else self.num_left_tokens,
            kv_capacity_tokens=self.cost.kv_capacity_tokens,
            busy_until_s=busy_until_s,
            num_requests=num_running + len(self.promised),
            num_running=num_running,
            num_running_tokens=num_kv_tokens,
            role=self.role,
        )

    def _slowdown(self) -> float:
        """Of prefill, by the decode batch that shares its steps."""
        decode, options = self.decode, self.options
        if not decode.num_batch:
            return 1.0
        batch_s = self._predictors.step.predict(decode.num_batch, decode.num_kv_tokens)
        chunk_s = options.step_target_s - batch_s
        if options.step_target_s <= 0:
            chunk_s = self._predictors.prefill.predict(options.mixed_tokens_per_step, 0)
        least_s = self._predictors.prefill.predict(options.page_size, 0) / 4
        return 1.0 + batch_s / max(chunk_s, least_s)

    # failures

    def withdraw(self, job: Job) -> None:
        """Takes a prefill out that is not to be finished here."""
        at = next((at for at, held in enumerate(self._held) if held[2] is job), None)
        if at is not None:
            del self._held[at]
            heapq.heapify(self._held)
            self.num_left_tokens -= job.num_tokens
            self.queued_s = max(self.queued_s - job.predicted_prefill_s, 0.0)
            self._on_change(self)
            return
        sequence = job.prefill_sequence
        if sequence is None or self.prefill_jobs.pop(sequence, None) is None:
            return
        self._fresh.pop(sequence, None)
        ready = any(entry.sequence is sequence and entry.runnable for entry in self.prefill._started)
        self._num_ready -= ready
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        self.num_left_tokens -= num_left
        self.num_fed_tokens -= num_left
        self.prefill.abort(sequence)
        self.prefill.release(sequence)
        self._on_change(self)

    def kill(self) -> None:
        """The process dies with all it has, but for the tokens that were sent."""
        if self._equal_ends:
            at = bisect_right(self._equal_ends, self._loop.now)
            if at:
                self._count(self._equal_ends[:at])
        for sequence, job in list(self.decode_jobs.items()):
            self._close_run(sequence, job, len(self.step_ends))
        self.down = True
        self.incarnation += 1
        version = self._version
        self._reset()
        self._version = version + 1

    def revive(self) -> None:
        self.down = False
        self._on_change(self)
