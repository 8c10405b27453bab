"""The steps of a prefill worker, on the engine's thread: what the scheduler decided is computed, pushed, sampled and recorded.

schedule ─► forward ─► sample ─► record ─► on_stepped, on the event loop
               └─ each layer's finished blocks go to the transfer thread
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..engine.engine import Engine
from ..engine.sequence import Sequence, StepChunk
from ..engine.step_loop import StepLoop
from ..protocol.worker_life import WorkerLife
from .job import PrefillJob
from .pusher import BlockPusher, finished_blocks
from .scheduler import PrefillScheduler, Step


class PrefillSteps(StepLoop[Step]):
    """on_stepped: told the seconds and tokens of each step, on the event loop."""

    def __init__(
        self,
        engine: Engine,
        scheduler: PrefillScheduler,
        jobs: Mapping[Sequence, PrefillJob],
        pusher: BlockPusher,
        life: WorkerLife,
        on_stepped: Callable[[float, int], None],
    ) -> None:
        super().__init__(f"{life.worker_address.worker_id}-engine", life.crashed)
        self._engine = engine
        self._scheduler = scheduler
        self._jobs = jobs
        self._pusher = pusher
        self._life = life
        self._on_stepped = on_stepped

    def schedule(self) -> Step | None:
        step = self._scheduler.schedule()
        return step if step.chunks else None

    def run(self, step: Step) -> None:
        began = time.monotonic()
        jobs = self._jobs_of(step, began)
        runs = [finished_blocks(job, chunk, self._engine.page_size) for job, chunk in jobs]
        logits = self._engine.forward(step.chunks, after_layer=self._pusher.step(runs))
        sampled, num_tokens = step.sampled, step.num_tokens
        samples = self._engine.sample(logits, sampled) if sampled else []
        if self._engine.device.type == "cuda":
            # a page that record() frees may be another's at once
            torch.cuda.current_stream(self._engine.device).synchronize()
        now = time.monotonic()
        for job, chunk in jobs:
            job.compute_s += (now - began) * chunk.num_tokens / num_tokens
        done: list[PrefillJob] = []
        for sequence, sample in zip(sampled, samples, strict=True):
            job = self._jobs.get(sequence)
            if job is not None:
                job.sample, job.sampled = sample, now
                done.append(job)
        with self.changed:
            self._scheduler.record(step)
        self._pusher.finish(done)
        self._life.tell(partial(self._on_stepped, now - began, num_tokens))

    def _jobs_of(self, step: Step, now: float) -> list[tuple[PrefillJob, StepChunk]]:
        """Less the calls that have ended since the step was scheduled."""
        found: list[tuple[PrefillJob, StepChunk]] = []
        for chunk in step.chunks:
            job = self._jobs.get(chunk.sequence)
            if job is not None:
                job.first_chunk = job.first_chunk or now
                found.append((job, chunk))
        return found
