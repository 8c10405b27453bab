"""The steps of a decode worker, on the engine's thread: what the scheduler decided is computed, sampled and recorded.

schedule ─► forward ─► sample ─► record ─► StepResult, to the event loop with one call_soon_threadsafe
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..engine.engine import Engine
from ..engine.sequence import Sequence
from ..engine.step_loop import StepLoop
from ..protocol.v1 import common_pb2
from ..protocol.worker_life import WorkerLife
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
    seconds: float
    num_tokens: int
    preempted: list[Sequence]


class DecodeSteps(StepLoop[Step]):
    """on_stepped: told of each step, on the event loop."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        jobs: Mapping[Sequence, DecodeJob],
        local: LocalPrefill,
        samples: StepSamples,
        life: WorkerLife,
        on_stepped: Callable[[StepResult], None],
    ) -> None:
        super().__init__(f"{life.station.worker_id}-engine", life.crashed)
        self._engine = engine
        self._scheduler = scheduler
        self._jobs = jobs
        self._local = local
        self._samples = samples
        self._life = life
        self._on_stepped = on_stepped

    def schedule(self) -> Step | None:
        step = self._scheduler.schedule()
        return step if step.chunks or step.preempted else None

    def run(self, step: Step) -> None:
        began, num_tokens = time.monotonic(), step.num_tokens
        outputs = self._compute(step, began) if step.chunks else []
        result = StepResult(outputs, time.monotonic() - began, num_tokens, step.preempted)
        self._life.tell(partial(self._on_stepped, result))

    def _compute(self, step: Step, began: float) -> list[StepOutput]:
        self._local.stepping(step, began)
        logits = self._engine.forward(step.chunks)
        sampled = step.sampled
        samples = self._engine.sample(logits, sampled) if sampled else []
        if self._engine.device.type == "cuda":
            # a page that record() frees may be another's at once
            torch.cuda.current_stream(self._engine.device).synchronize()
        ended = time.monotonic()
        self._local.stepped(step, ended - began)
        self._samples.note(step.chunks, began, ended)
        with self.changed:
            generated = self._scheduler.record(step, [sample.token_id for sample in samples])
        found = ((self._jobs.get(sequence), row, reason) for sequence, row, reason in generated)
        return [StepOutput(job, samples[row].to_proto(), reason) for job, row, reason in found if job is not None]
