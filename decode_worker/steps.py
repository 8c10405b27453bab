"""What the decode half does about its part of a step, on the step loop's thread.

begin: whose local prefill this is the first chunk of ─► executor ─► end: recorded ─► StepResult, to the event loop in one call
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from ..engine.executor import BlockPush, PromptLogprobs, TokenSample
from ..engine.model_flops import StepWork
from ..engine.sequence import Sequence
from ..engine.step_loop import StepRun
from ..protocol.errors import HalfmoonError
from ..protocol.v1 import common_pb2
from .job import DecodeJob
from .local_prefill import LocalPrefill
from .scheduler import DecodeScheduler, Step
from .step_samples import StepSamples


class StepOutput(NamedTuple):
    """What a step gave to a job."""

    job: DecodeJob
    token: common_pb2.TokenOutput
    finish_reason: common_pb2.FinishReason | None


class StepResult(NamedTuple):
    outputs: list[StepOutput]
    seconds: float  # from its launch, or the end of the step it was launched behind
    work: StepWork
    preempted: list[Sequence]
    failed: list[tuple[DecodeJob, HalfmoonError]]
    prompt_logprobs: list[tuple[DecodeJob, PromptLogprobs]]


class DecodeSteps:
    """Args:
    changed: guards the scheduler.
    tell: runs a call on the event loop. on_stepped: told of each step, there.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        jobs: Mapping[Sequence, DecodeJob],
        local: LocalPrefill,
        samples: StepSamples,
        changed: threading.Condition,
        tell: Callable[[Callable[[], None]], None],
        on_stepped: Callable[[StepResult], None],
    ) -> None:
        self._scheduler = scheduler
        self._jobs = jobs
        self._local = local
        self._samples = samples
        self._changed = changed
        self._tell = tell
        self._on_stepped = on_stepped

    def begin(self, part: Step, now: float) -> list[BlockPush]:
        self._local.stepping(part, now)
        return []  # its blocks are cached at the end, from the pages

    def pushes_given(self, part: Step) -> None:
        """It has none."""

    def end(self, part: Step, samples: list[TokenSample], run: StepRun, failed: Mapping[Sequence, HalfmoonError]) -> None:
        work = StepWork.of(part.chunks, len(samples))
        self._local.stepped(part, run.seconds_per_token)
        self._samples.note(run.chunks, run.began, run.ended)
        with self._changed:
            for sequence in failed:
                self._scheduler.abort(sequence)
            generated = self._scheduler.record(part, [sample.token_id for sample in samples])
        found = ((self._jobs.get(sequence), row, reason) for sequence, row, reason in generated)
        outputs = [StepOutput(job, samples[row].to_proto(), reason) for job, row, reason in found if job is not None]
        ended = [(job, error) for sequence, error in failed.items() if (job := self._jobs.get(sequence)) is not None]
        scored = [(job, found) for sequence, found in run.prompt_logprobs.items() if (job := self._jobs.get(sequence)) is not None]
        self._tell(partial(self._on_stepped, StepResult(outputs, run.seconds, work, part.preempted, ended, scored)))
