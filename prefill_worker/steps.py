"""What the prefill half does about its part of a step, on the step loop's thread.

begin: whose first chunk this is, which blocks it finishes ─► executor ─► pushes_given: who has no more ─► end: sampled, recorded, told
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

from ..engine.executor import BlockPush, PageTransfer, TokenSample
from ..engine.model_flops import StepWork
from ..engine.sequence import Sequence
from ..engine.step_loop import StepRun
from ..protocol.errors import HalfmoonError
from .job import PrefillJob
from .pusher import finished_blocks
from .scheduler import PrefillScheduler, Step


class PrefillSteps:
    """Args:
    changed: guards the scheduler.
    tell: runs a call on the event loop. on_stepped: told the seconds and the work of each step, there. on_failed: of what failed.
    """

    def __init__(
        self,
        scheduler: PrefillScheduler,
        jobs: Mapping[Sequence, PrefillJob],
        pages: PageTransfer,
        changed: threading.Condition,
        tell: Callable[[Callable[[], None]], None],
        on_stepped: Callable[[float, StepWork], None],
        on_failed: Callable[[PrefillJob, HalfmoonError], None],
    ) -> None:
        self._scheduler = scheduler
        self._jobs = jobs
        self._pages = pages
        self._changed = changed
        self._tell = tell
        self._on_stepped = on_stepped
        self._on_failed = on_failed

    def begin(self, part: Step, now: float) -> list[BlockPush]:
        pushes: list[BlockPush] = []
        for chunk in part.chunks:
            job = self._jobs.get(chunk.sequence)
            if job is not None:  # its call has not ended since the step was scheduled
                job.first_chunk = job.first_chunk or now
                pushes.append(finished_blocks(job, chunk, self._scheduler.block_size))
        return pushes

    def pushes_given(self, part: Step) -> None:
        # not with the end: the next step is launched by then, and its pushes would have to be computed first
        for sequence in part.sampled:
            if (job := self._jobs.get(sequence)) is not None:
                self._pages.when_landed(job.tell_pushed)

    def end(self, part: Step, samples: list[TokenSample], run: StepRun, failed: Mapping[Sequence, HalfmoonError]) -> None:
        for chunk in part.chunks:
            job = self._jobs.get(chunk.sequence)
            if job is not None:
                job.compute_s += run.seconds_per_token * chunk.num_tokens
                if (scored := run.prompt_logprobs.get(chunk.sequence)) is not None:
                    job.prompt_logprobs.append(scored)
        for sequence, sample in zip(part.sampled, samples, strict=True):
            job = self._jobs.get(sequence)
            if job is not None and sequence not in failed:
                job.sample, job.sampled = sample, run.ended
                self._tell(job.set_computed)
        work = StepWork.of(part.chunks, len(samples))
        with self._changed:
            for sequence in failed:
                self._scheduler.abort(sequence)
            self._scheduler.record(part)
        for sequence, error in failed.items():
            if (job := self._jobs.get(sequence)) is not None:
                self._tell(partial(self._on_failed, job, error))
        self._tell(partial(self._on_stepped, run.seconds, work))
