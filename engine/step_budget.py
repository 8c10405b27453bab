"""How many prompt tokens a worker's next step may compute: by what its own steps were measured to take.

steps that were run ─► StepFit ─► StepCost ┐
who decodes next, what waits ──────────────┴─► ChunkSizer ─► tokens
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Seq
from typing import NamedTuple

from ..protocol.timing.chunk_sizer import LEAST_CHUNK_TOKENS
from ..protocol.timing.step_cost import ChunkWork, StepCost, StepWork, attention_of
from ..protocol.timing.step_fit import StepFit
from ..protocol.timing.step_limits import StepLimits
from .prompt_turns import LeftS
from .sequence import StepChunk


class DecodeLoad(NamedTuple):
    """What the next step decodes."""

    decodes: StepWork
    target_s: float  # that it may take, by the tightest of those who decode; inf: nobody bounds it


class StepBudget:
    """
    Args:
        prior: what steps are thought to take, until they are measured.
        row_counts: see ExecutorFacts.
    """

    def __init__(self, limits: StepLimits, prior: StepCost, block_size: int, row_counts: Seq[int] = ()) -> None:
        self.default_tpot_s = limits.tpot_target_s or math.inf
        self._sizer = limits.sizer(max(LEAST_CHUNK_TOKENS, block_size), row_counts)
        self._fit = StepFit(prior)

    def num_tokens(self, load: DecodeLoad, waiting: Seq[ChunkWork]) -> int:
        """waiting: in the order in which the step's chunks are taken from it."""
        return self._sizer.num_tokens(self._fit, load.decodes, load.target_s, waiting)

    def left_s(self, load: DecodeLoad) -> LeftS:
        """Seconds that a prompt takes beside what is decoded now."""
        pace = functools.cache(lambda: self._sizer.pace(self._fit, load.decodes, load.target_s))  # most steps keep their turns
        return lambda work: pace() * self._sizer.alone_s(self._fit, work)

    def seconds(self, chunks: Seq[StepChunk]) -> float:
        """Predicted, of a step."""
        return self._fit.seconds(work_of(chunks))

    def observe(self, chunks: Seq[StepChunk], seconds: float) -> None:
        """A step was run. To be told before it is recorded: what decodes is told by its sequence's tokens."""
        self._fit.observe(work_of(chunks), seconds)


def work_of(chunks: Seq[StepChunk]) -> StepWork:
    num_tokens = num_decodes = num_context_tokens = 0
    attention = 0.0
    for chunk in chunks:
        if chunk.is_decode:
            num_decodes += 1
            num_context_tokens += chunk.start + 1
        else:
            num_tokens += chunk.num_tokens
            attention += attention_of(chunk.num_tokens, chunk.start)
    return StepWork(num_tokens, attention, num_decodes, num_context_tokens)
