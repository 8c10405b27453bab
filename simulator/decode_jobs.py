"""The jobs that an instance decodes, and which of its steps gave a token to which job.

promise ─► add (the hand-off is whole) ─start─► in the batch ─► count · end_whole ─► done
step_ends   one moment a step; a job's tokens are runs of them: (instance, first step, end)
"""

from __future__ import annotations

import heapq
import math

from ..decode_worker.scheduler import Step
from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..protocol.timing.chunk_sizer import MARGIN, token_target_s
from .decode_batch import DecodeBatch, decode_sequence
from .job import Job
from .owner import Owner


class DecodeJobs:
    """Promises and step ends outlive the process; what was decoding does not."""

    def __init__(self, instance: str, owner: Owner) -> None:
        self.promised: dict[Job, int] = {}  # jobs that will decode here -> tokens
        self.num_promised_tokens = 0
        self.step_ends: list[float] = []  # when each step that gave decode tokens ended
        self._instance = instance
        self._owner = owner

    def reset(self, allocator: PageAllocator, page_size: int, max_running: int, tpot_s: float) -> None:
        """For a new process. tpot_s: of every request; inf: none."""
        self._tpot_s = tpot_s
        self._in_hand: list[tuple[float, int, Sequence]] = []  # start less what its steps may have taken; the least is the tightest
        self._num_started = 0
        self.batch = DecodeBatch(allocator, page_size, max_running=max_running)
        self.jobs: dict[Sequence, Job] = {}
        self._open: dict[Sequence, int] = {}  # decoding -> first of its present run of steps

    def promise(self, job: Job, num_tokens: int) -> None:
        self.promised[job] = num_tokens
        self.num_promised_tokens += num_tokens

    def unpromise(self, job: Job) -> None:
        self.num_promised_tokens -= self.promised.pop(job, 0)

    def add(self, job: Job) -> None:
        """Its hand-off is here, whole; start() takes it in."""
        self.unpromise(job)
        request = job.request
        steps = self.batch.steps
        sequence = decode_sequence(str(job.index), request.num_input_tokens, job.num_tokens, request.num_output_tokens, 0, steps)
        self.jobs[sequence] = job
        self.batch.add(sequence)

    def target_s(self, now: float) -> float:
        """What a step that begins now may take, by the sequence with the least in hand; inf where nobody bounds it."""
        if not math.isfinite(self._tpot_s) or not self.jobs:
            return math.inf
        while self._in_hand[0][2] not in self.jobs:
            heapq.heappop(self._in_hand)
        steps, usual_s = self.batch.steps.value, MARGIN * self._tpot_s
        # every sequence gets a token a step, so that the tightest stays the tightest
        in_hand_s = self._in_hand[0][0] + usual_s * steps - now
        return token_target_s(self._tpot_s, 0, -in_hand_s)

    def start(self, now: float) -> None:
        """Between two steps: pages are written then."""
        while self.batch.num_waiting:
            started = self.batch.start()
            if not started:
                return
            for sequence in started:
                self._owner.decode_started(self.jobs[sequence])
                self._num_started += 1
                may_have_s = MARGIN * self._tpot_s * self.batch.steps.value if math.isfinite(self._tpot_s) else 0.0
                heapq.heappush(self._in_hand, (now - may_have_s, self._num_started, sequence))
                if self.batch.join(sequence):
                    self._ended(sequence)

    def open_runs(self) -> None:
        """Everyone in the batch gets a token from the next step."""
        if len(self._open) == self.batch.num_batch:
            return
        at = len(self.step_ends)
        for sequence in self.batch.sequences:
            if sequence not in self._open:
                self._open[sequence] = at

    def count(self, ends: list[float]) -> None:
        """Steps that were all the same are done; each ended at one of ends."""
        self.step_ends.extend(ends)
        for sequence in self.batch.count(len(ends)):
            self._ended(sequence)

    def end_whole(self, step: Step, now: float) -> None:
        """The scheduler's own step is done."""
        at = len(self.step_ends)
        ended = self.batch.end_whole(step)
        self.step_ends.append(now)
        for sequence in [one for one in self._open if one not in ended.got_token]:
            self._close_run(sequence, self.jobs[sequence], at)
        for sequence in ended.got_token:
            self._open.setdefault(sequence, at)
        for sequence in ended.finished:
            self._ended(sequence)

    def close_runs(self) -> None:
        """The process dies; what was sent stays sent."""
        for sequence, job in self.jobs.items():
            self._close_run(sequence, job, len(self.step_ends))

    def _ended(self, sequence: Sequence) -> None:
        job = self.jobs.pop(sequence)
        self.batch.release(sequence)
        self._close_run(sequence, job, len(self.step_ends))
        self._owner.decode_done(job)

    def _close_run(self, sequence: Sequence, job: Job, end: int) -> None:
        first = self._open.pop(sequence, end)
        if end > first:
            job.token_runs.append((self._instance, first, end))
