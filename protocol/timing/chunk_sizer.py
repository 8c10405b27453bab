"""How many prompt tokens the next step may compute, so that nobody who decodes gets his token too late.

TPOT of each who decodes, and what he has in hand ─► the tightest: what the step may take ┐
StepCost · decode tokens · prompts that wait ────────────────────────────────────────────┴─► the largest size that fits
Without decode tokens it is the largest step that prefill takes. At least `least` in any case: a prompt never starves.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from .step_cost import ChunkWork, StepWork, attention_of, with_chunks

MARGIN = 0.96  # of the TPOT that steps may take: the rest is for what no prediction knows, and for the way to the client
SPREAD = 4.0  # steps that what a sequence has in hand is spent on
AHEAD = 1.0  # TPOTs that a step may take more, by what every sequence has in hand
ALIGNMENT = 64  # tokens, of sizes without a graph
LEAST_CHUNK_TOKENS = 64  # that a step computes however late it makes others; they mostly ride along under the read of the weights


def token_target_s(tpot_s: float, num_tokens: int, elapsed_s: float) -> float:
    """Seconds that a sequence's next step may take, so that its mean stays under MARGIN of tpot_s.

    Steps that were faster than that have left it something in hand, a part of which the next one may take. A sequence that is late
    is not made up for: smaller chunks would make prompts late, too.

    Args:
        num_tokens: that it got after its first one.
        elapsed_s: since its first one, until the step begins.
    """
    usual_s = MARGIN * tpot_s
    if not math.isfinite(usual_s):
        return math.inf
    in_hand_s = num_tokens * usual_s - elapsed_s
    return usual_s + min(max(in_hand_s / SPREAD, 0.0), AHEAD * tpot_s)


class Predicted(Protocol):
    """What a step takes. More work never takes less."""

    def seconds(self, work: StepWork) -> float: ...


class ChunkSizer:
    """
    Args:
        most: tokens in a step that nobody decodes in, and at most in one where somebody does (most_beside).
        least: tokens that a step computes however long it takes. Not more than `most`.
        row_counts: rows, decode tokens included, that steps are padded to where a graph runs them; ascending. Empty: no graphs.
    """

    def __init__(self, *, most: int, most_beside: int, least: int, row_counts: Sequence[int] = ()) -> None:
        self._most = most
        self._most_beside = most_beside
        self._least = least
        self._row_counts = tuple(row_counts)

    def num_tokens(self, cost: Predicted, decodes: StepWork, target_s: float, waiting: Sequence[ChunkWork]) -> int:
        """Of the next step's chunks, which come from `waiting` in its order. 0 where nothing waits.

        Args:
            decodes: the step's decode tokens alone.
            target_s: what it may take; inf: no bound but the largest size.
        """
        if not waiting:
            return 0
        if not decodes.num_decodes:
            return self._most
        if not math.isfinite(target_s):
            return self._most_beside
        sizes = self._sizes(decodes.num_decodes)
        fitting = bisect_right(sizes, target_s, key=lambda size: cost.seconds(with_chunks(decodes, waiting, size)))
        return sizes[fitting - 1] if fitting else min(self._least, self._most_beside)

    def alone_s(self, cost: Predicted, work: ChunkWork) -> float:
        """Of a prompt, or the part of one that is left, in the largest steps with nobody beside it."""
        num_tokens = work.num_left_tokens
        if num_tokens <= 0:
            return 0.0
        num_steps = max(num_tokens / self._most, 1.0)
        return num_steps * cost.seconds(
            StepWork(round(num_tokens / num_steps), attention_of(num_tokens, work.num_prefix_tokens) / num_steps)
        )

    def pace(self, cost: Predicted, decodes: StepWork, target_s: float) -> float:
        """How many times as long as alone a prompt takes beside those who decode; at least 1."""
        if not decodes.num_decodes:
            return 1.0
        endless = ChunkWork(0, self._most)
        size = self.num_tokens(cost, decodes, target_s, [endless])
        alone_s = size / self._most * cost.seconds(StepWork(self._most, attention_of(size, 0) * self._most / size))
        return max(cost.seconds(with_chunks(decodes, [endless], size)) / alone_s, 1.0) if alone_s > 0.0 else 1.0

    def _sizes(self, num_decodes: int) -> list[int]:
        """Above the least, that a step of so many decode tokens is not padded at; ascending, most_beside the last."""
        sizes = [rows - num_decodes for rows in self._row_counts]
        largest = max(sizes, default=0)
        sizes += range(max(largest, 0) + ALIGNMENT, self._most_beside, ALIGNMENT)
        return [size for size in sizes if self._least < size < self._most_beside] + [self._most_beside]
