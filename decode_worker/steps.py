"""The steps of a decode worker, on the engine's thread: what the scheduler decided is computed, sampled and recorded.

schedule ─► forward ─► sample ─► record ─► StepResult, to the event loop with one call_soon_threadsafe

Where the engine can launch a step without waiting for it, the next one is on its way before this one's tokens are read:
host    schedule n │ launch n │ schedule n+1 │ launch n+1 │ read n, record n │ schedule n+2 │ launch n+2 │ read n+1, record n+1 │ …
device                        └─ step n ──────────────────┴─ step n+1 ────────────────────────────────┴─ step n+2 ─ …
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..engine.engine import Engine
from ..engine.sampler import TokenSample
from ..engine.sequence import Sequence
from ..engine.step_graphs import InFlight
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
    seconds: float  # from its launch, or the end of the step it was launched behind
    num_tokens: int
    preempted: list[Sequence]


class _Launched(NamedTuple):
    step: Step
    in_flight: InFlight


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
        super().__init__(f"{life.worker_address.worker_id}-engine", life.crashed)
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
        began = time.monotonic()
        launched = self._launch(step) if step.chunks else None
        if launched is None:
            self._end(step, self._compute(step, began), began)
        while launched is not None:
            ahead = self._launch_behind()
            began = self._land(launched, began)
            launched = ahead

    def _launch(self, step: Step) -> _Launched | None:
        """None where its tokens can't be had without waiting for it."""
        in_flight = self._engine.launch(step.chunks)
        if in_flight is None:
            return None
        self._local.stepping(step, time.monotonic())
        return _Launched(step, in_flight)

    def _launch_behind(self) -> _Launched | None:
        """The step after the one that runs, where it can be told before that one has ended."""
        with self.changed:
            ahead = None if self._stopping else self._scheduler.schedule_ahead()
        if ahead is None:
            return None
        launched = self._launch(ahead)
        if launched is None:
            with self.changed:
                self._scheduler.withdraw(ahead)
        return launched

    def _land(self, launched: _Launched, began: float) -> float:
        """When its tokens were there. A page that record() frees may be another's at once: no step that is still under way uses it."""
        samples = [TokenSample(token_id, None, []) for token_id in launched.in_flight.tokens()]
        return self._end(launched.step, samples, began)

    def _compute(self, step: Step, began: float) -> list[TokenSample]:
        if not step.chunks:
            return []
        self._local.stepping(step, began)
        logits = self._engine.forward(step.chunks)
        samples = self._engine.sample(logits, step.sampled) if step.sampled else []
        if self._engine.device.type == "cuda":
            # a page that record() frees may be another's at once
            torch.cuda.current_stream(self._engine.device).synchronize()
        return samples

    def _end(self, step: Step, samples: list[TokenSample], began: float) -> float:
        """Records what the step gave and tells the event loop. Returns when it was over."""
        ended = time.monotonic()
        num_tokens = step.num_tokens
        self._local.stepped(step, ended - began)
        self._samples.note(step.chunks, began, ended)
        with self.changed:
            generated = self._scheduler.record(step, [sample.token_id for sample in samples])
        found = ((self._jobs.get(sequence), row, reason) for sequence, row, reason in generated)
        outputs = [StepOutput(job, samples[row].to_proto(), reason) for job, row, reason in found if job is not None]
        self._life.tell(partial(self._on_stepped, StepResult(outputs, ended - began, num_tokens, step.preempted)))
        return ended
