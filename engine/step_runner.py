"""Computes a step so that what breaks it fails alone.

chunks ─► those of suspects, each by itself ─┐
       └► the others, together ──────────────┴─► samples
                    └─ StepFailed ─► its halves, each by itself ─► … ─► a single chunk: its sequence has failed, and no other

A chunk that is computed again writes the same slots, and its token is drawn from the same state: nothing is kept before the record.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence as Seq
from typing import NamedTuple

from ..protocol.errors import HalfmoonError, SequenceFailed
from .executor import NOT_FINITE, BlockPush, Executor, PromptLogprobs, StepFailed, TokenSample
from .sequence import Sequence, StepChunk

logger = logging.getLogger(__name__)

MAX_BARREN_STEPS = 8  # in a row, of which no chunk could be computed: then it is the worker that is broken, and not they


class Computed(NamedTuple):
    samples: list[TokenSample]  # of every chunk that samples, in their order; those of failed sequences mean nothing
    failed: dict[Sequence, HalfmoonError]
    prompt_logprobs: dict[Sequence, PromptLogprobs]


class _Found(NamedTuple):
    samples: dict[Sequence, TokenSample]
    failed: dict[Sequence, HalfmoonError]
    prompt_logprobs: dict[Sequence, PromptLogprobs]


class StepRunner:
    """For the step loop's thread.

    Attributes:
        running: sequences that are computed now, or were when run() raised.
    """

    def __init__(self, executor: Executor) -> None:
        self.running: list[Sequence] = []
        self._executor = executor
        self._num_barren = 0

    def run(self, chunks: Seq[StepChunk], pushes: Seq[BlockPush]) -> Computed:
        """Raises DeviceLost, and StepFailed where nothing could be computed MAX_BARREN_STEPS times in a row."""
        found = _Found({}, {}, {})
        groups = [[chunk for chunk in chunks if not chunk.sequence.suspect], *([chunk] for chunk in chunks if chunk.sequence.suspect)]
        for group in groups:
            if group:
                self._run(group, _of(pushes, group), found)
        failed = found.failed
        self._num_barren = self._num_barren + 1 if len(failed) == len(chunks) else 0
        if self._num_barren >= MAX_BARREN_STEPS:
            raise StepFailed(f"in {self._num_barren} steps in a row nothing could be computed; the last: {next(iter(failed.values()))}")
        self.running = []
        none = TokenSample(NOT_FINITE, None, [])
        samples = [found.samples.get(chunk.sequence, none) for chunk in chunks if chunk.is_last]
        return Computed(samples, failed, found.prompt_logprobs)

    def _run(self, chunks: list[StepChunk], pushes: list[BlockPush], found: _Found, num_pushed_layers: int | None = None) -> None:
        """num_pushed_layers: by the run that failed; the others follow the retry. None: this is the first run."""
        self.running = [chunk.sequence for chunk in chunks]
        try:
            outcome = self._executor.run(chunks, pushes if num_pushed_layers is None else ())
        except StepFailed as failure:
            num_pushed = failure.num_pushed_layers if num_pushed_layers is None else num_pushed_layers
            self._isolate(chunks, pushes, found, num_pushed, failure)
            return
        found.samples.update(zip([chunk.sequence for chunk in chunks if chunk.is_last], outcome.samples, strict=True))
        found.prompt_logprobs.update(outcome.prompt_logprobs)
        if pushes and num_pushed_layers is not None:
            for layer in range(num_pushed_layers, self._executor.facts.schema.num_layers):
                self._executor.pages.push(pushes, range(layer, layer + 1))

    def _isolate(
        self, chunks: list[StepChunk], pushes: list[BlockPush], found: _Found, num_pushed_layers: int, failure: StepFailed
    ) -> None:
        if len(chunks) == 1:
            found.failed[chunks[0].sequence] = _failed(chunks[0].sequence, failure)
            return
        logger.warning("a step of %d chunks failed, and is tried in halves: %s", len(chunks), failure)
        self._wait_for_pushes(pushes)
        middle = len(chunks) // 2
        for half in (chunks[:middle], chunks[middle:]):
            self._run(half, _of(pushes, half), found, num_pushed_layers)

    def _wait_for_pushes(self, pushes: list[BlockPush]) -> None:
        """What was pushed is read from the pages that the retry writes."""
        if pushes:
            landed = threading.Event()
            self._executor.pages.when_landed(landed.set)
            landed.wait()


def _failed(sequence: Sequence, failure: StepFailed) -> SequenceFailed:
    logger.error("request %s can't be computed", sequence.request_id, exc_info=failure)
    return SequenceFailed(f"request {sequence.request_id} could not be computed: {failure}; the worker's log has the traceback")


def _of(pushes: Seq[BlockPush], chunks: list[StepChunk]) -> list[BlockPush]:
    """A push names its sequence's own list of pages."""
    return [push for push in pushes if any(push.pages is chunk.sequence.pages for chunk in chunks)]
