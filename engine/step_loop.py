"""The thread that runs a worker's steps, one after another, and sleeps while there is nothing to do.

with changed: scheduler.…; notify ─► schedule (under the lock) ─► begin ─► run ─► end: recorded, told ─► schedule ─► … ─► None: sleep

Where the executor can launch a step without waiting for it, the next one is on its way before this one's tokens are read:
host    schedule n │ launch n │ schedule n+1 │ launch n+1 │ read n, record n │ schedule n+2 │ launch n+2 │ read n+1, record n+1 │ …
device                        └─ step n ──────────────────┴─ step n+1 ────────────────────────────────┴─ step n+2 ─ …

A sequence that can't be computed, or whose logits give no token, fails alone; a device that is lost ends the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..protocol.errors import HalfmoonError, InvalidRequest, NonFiniteLogits, SequenceFailed
from .combined_scheduler import CombinedScheduler, CombinedStep
from .executor import NOTHING_LEFT, BlockPush, Executor, InFlightStep, PromptLogprobs, StepFailed, TokenSample
from .page_allocator import PageAllocator
from .sequence import Sequence, StepChunk
from .step_runner import Computed, StepRunner
from .work_front import WorkFront

logger = logging.getLogger(__name__)


class StepRun(NamedTuple):
    """How a step went, whoever's chunks it held."""

    chunks: list[StepChunk]
    began: float  # of time.monotonic(): its launch, or the end of the step it was launched behind
    ended: float
    prompt_logprobs: Mapping[Sequence, PromptLogprobs]  # of chunks that scored their prompts

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(sum(chunk.num_tokens for chunk in self.chunks), 1)


class StepHalf(Protocol):
    """What a half does about its part of a step, on the loop's thread."""

    def begin(self, part: Any, now: float) -> list[BlockPush]:
        """Before it runs, or as soon as it is launched. What of it is to be pushed."""
        ...

    def pushes_given(self, part: Any) -> None:
        """Every push of it is on its way, and none of a later step yet."""
        ...

    def end(self, part: Any, samples: list[TokenSample], run: StepRun, failed: Mapping[Sequence, HalfmoonError]) -> None:
        """Records it, with the lock, and tells the event loop.

        Args:
            samples: of the part's chunks with is_last as they were scheduled; those of failed sequences mean nothing.
            failed: sequences of either half that end with it; nothing of the step is kept for them. One may come twice.
        """
        ...


class _Launched(NamedTuple):
    step: CombinedStep
    in_flight: InFlightStep


class StepLoop:
    """Args:
    changed: guards the scheduler; notified when there may be a step.
    on_crash: told, on this thread, what broke it, and the ids of the requests that were computed then; no step follows.
    """

    def __init__(
        self,
        name: str,
        executor: Executor,
        scheduler: CombinedScheduler,
        changed: threading.Condition,
        *,
        allocator: PageAllocator,
        decode: StepHalf,
        prefill: StepHalf,
        on_crash: Callable[[BaseException, frozenset[str]], None],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._changed = changed
        self._allocator = allocator
        self._decode = decode
        self._prefill = prefill
        self._on_crash = on_crash
        self._runner = StepRunner(executor)
        self._in_flight: list[CombinedStep] = []
        self.front = WorkFront()
        self._oldest: list[StepChunk] = []  # of the oldest step that is not over
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def expected_s(self) -> float:
        """What the oldest step that is not over should take. Any thread."""
        return self._scheduler.expected_s(self._oldest)

    def stop(self) -> None:
        """Waits for the step under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while (step := self._next()) is not None:
                self._run(step)
        except Exception as error:  # the thread's boundary: the event loop has to hear of it, or every call would hang
            logger.exception("%s broke", self._thread.name)
            self._on_crash(error, self._computed_ids())

    def _computed_ids(self) -> frozenset[str]:
        in_flight = [chunk.sequence for step in self._in_flight for chunk in step.chunks]
        return frozenset(sequence.request_id for sequence in (*in_flight, *self._runner.running))

    def _next(self) -> CombinedStep | None:
        """Sleeps until there is one; None when stopping."""
        with self._changed:
            while not self._stopping:
                step = self._scheduler.schedule(time.monotonic())
                if step is not None:
                    return step
                self._changed.wait()
        return None

    def _run(self, step: CombinedStep) -> None:
        began = time.monotonic()
        self._oldest = step.chunks
        self.front.begin()
        launched = self._launch(step, began)
        if launched is None:
            self._end(step, self._compute(step, began), began)
            self.front.end()
        while launched is not None:
            self._oldest = launched.step.chunks
            ahead = self._launch_behind()
            began = self._land(launched, began)
            self.front.end()
            launched = ahead

    def _launch(self, step: CombinedStep, now: float) -> _Launched | None:
        """None where its tokens can't be had without waiting for it, or what it holds has to be computed apart."""
        if not step.chunks or any(chunk.sequence.suspect for chunk in step.chunks):
            return None
        pushes = self._begin(step, now)
        try:
            in_flight = self._executor.launch(step.chunks, pushes)
        except StepFailed as failure:
            logger.warning("a step of %d chunks could not be launched: %s", len(step.chunks), failure)
            for push in pushes if failure.num_pushed_layers else ():  # what has gone can't go once more
                push.listener.push_failed(SequenceFailed(f"the step that pushes these blocks failed: {failure}"))
            return None
        if in_flight is None:
            return None
        self._in_flight.append(step)
        self._pushes_given(step)
        return _Launched(step, in_flight)

    def _launch_behind(self) -> _Launched | None:
        """The step after the one that runs, where it can be told before that one has ended."""
        with self._changed:
            ahead = None if self._stopping else self._scheduler.schedule_ahead(time.monotonic())
        if ahead is None:
            return None
        launched = self._launch(ahead, time.monotonic())
        if launched is None:
            with self._changed:
                self._scheduler.withdraw(ahead)
        else:
            self.front.begin()
        return launched

    def _begin(self, step: CombinedStep, now: float) -> list[BlockPush]:
        """May come twice for a step: for a launch that is not to be had, and when it runs. What is to be pushed."""
        pushes: list[BlockPush] = []
        if step.decode.chunks:
            pushes += self._decode.begin(step.decode, now)
        if step.prefill is not None:
            pushes += self._prefill.begin(step.prefill, now)
        return pushes

    def _land(self, launched: _Launched, began: float) -> float:
        """When its tokens were there. A page that the record frees may be another's at once: no step that is under way uses it."""
        samples = [TokenSample(token_id, None, []) for token_id in launched.in_flight.tokens()]
        self._in_flight.remove(launched.step)
        return self._end(launched.step, Computed(samples, {}, {}), began)

    def _compute(self, step: CombinedStep, began: float) -> Computed:
        if not step.chunks:
            return Computed([], {}, {})
        computed = self._runner.run(step.chunks, self._begin(step, began))
        self._pushes_given(step)
        return computed

    def _pushes_given(self, step: CombinedStep) -> None:
        if step.decode.chunks:
            self._decode.pushes_given(step.decode)
        if step.prefill is not None:
            self._prefill.pushes_given(step.prefill)

    def _end(self, step: CombinedStep, computed: Computed, began: float) -> float:
        """Returns when it was over."""
        run = StepRun(step.chunks, began, time.monotonic(), computed.prompt_logprobs)
        if not computed.failed:  # else it ran in pieces, more than once
            self._scheduler.observe(run.chunks, run.seconds)
        samples, num_decode = computed.samples, len(step.decode.sampled)
        failed = self._failed(step, computed)
        for sequence, found in run.prompt_logprobs.items():
            sequence.num_scored_tokens = found.start + len(found.logprobs)
        if step.decode.chunks or step.decode.preempted:
            self._decode.end(step.decode, samples[:num_decode], run, failed)
        if step.prefill is not None:
            self._prefill.end(step.prefill, samples[num_decode:], run, failed)
        return run.ended

    def _failed(self, step: CombinedStep, computed: Computed) -> dict[Sequence, HalfmoonError]:
        failed = dict(computed.failed)
        for sequence, found in computed.prompt_logprobs.items():
            if np.isnan(found.logprobs).any():
                failed[sequence] = _no_prompt_logprobs(sequence)
                self._clear(sequence)
        sampled = step.decode.sampled + (step.prefill.sampled if step.prefill is not None else [])
        for sequence, sample in zip(sampled, computed.samples, strict=True):
            if sample.token_id < 0 and sequence not in failed:
                failed[sequence] = _no_token(sequence, sample.token_id)
                if sample.token_id != NOTHING_LEFT:
                    self._clear(sequence)  # before the record may give its pages to another
        return failed

    def _clear(self, sequence: Sequence) -> None:
        """Nobody finds its numbers that are none. Pages that others use stay as they are: zeros would give them a wrong answer."""
        pages = self._executor.find_not_finite(sequence.pages)
        with self._changed:
            own = self._allocator.discard(sequence, pages)
        self._executor.scrub(own)


def _no_token(sequence: Sequence, reason: int) -> HalfmoonError:
    number = sequence.num_output_tokens + 1
    if reason == NOTHING_LEFT and sequence.grammar is not None:
        return InvalidRequest(
            f"token {number} of {sequence.request_id} can't be drawn: no token of the model goes on with the text within its grammar",
            param="response_format",
        )
    if reason == NOTHING_LEFT:
        return InvalidRequest(
            f"token {number} of {sequence.request_id} can't be drawn: min_tokens and stop_token_ids rule out every token of the model; "
            "leave one of them out",
            param="min_tokens",
        )
    return NonFiniteLogits(
        f"the model's logits for token {number} of {sequence.request_id} are not finite; check the checkpoint, and in float16 try "
        "another model.dtype",
        token=number,
    )


def _no_prompt_logprobs(sequence: Sequence) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the model's logits for tokens of {sequence.request_id}'s prompt are not finite; check the checkpoint, and in float16 try another "
        "model.dtype"
    )
