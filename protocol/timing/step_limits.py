"""What is configured of a worker's steps with prompts in them. The worker sizes its chunks by it, and the proxy predicts by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .chunk_sizer import LEAST_CHUNK_TOKENS, ChunkSizer


class StepLimits(NamedTuple):
    """The defaults are those of the configuration."""

    max_tokens: int = 2048  # of chunks, where nobody decodes
    max_tokens_beside: int = 2048  # where somebody does
    tpot_target_s: float = 0.05  # that steps are sized for, of sequences without a TPOT of their own; 0: they bound nothing

    def sizer(self, least: int = LEAST_CHUNK_TOKENS, row_counts: Sequence[int] = ()) -> ChunkSizer:
        """least, row_counts: as ChunkSizer's."""
        # not more than where nobody decodes: who was counted among those who decode may yet lose its place
        most_beside = min(self.max_tokens_beside, self.max_tokens)
        return ChunkSizer(most=self.max_tokens, most_beside=most_beside, least=least, row_counts=row_counts)


DEFAULT_LIMITS = StepLimits()
