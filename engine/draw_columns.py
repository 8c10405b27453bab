"""Sampling parameters of a step's rows as columns of numbers, written again only where the rows have changed."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from .sequence import Sequence

DRAW_COLUMNS = {
    "temperatures": np.dtype(np.float32),
    "top_ks": np.dtype(np.int64),
    "top_ps": np.dtype(np.float32),
    "min_ps": np.dtype(np.float32),
    "seeds": np.dtype(np.int64),
    "indices": np.dtype(np.int64),  # of the token that is drawn, among a sequence's output tokens
}
"""What kernels/sampling.py takes, in its order."""

DRAW_PADDING = {name: 1 if name == "top_ps" else 0 for name in DRAW_COLUMNS}
"""What a row holds that no sequence owns: the likeliest token is drawn there."""


class DrawColumns:
    """columns: arrays of DRAW_COLUMNS by name, as long as the rows may be many."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = columns
        self._sequences: list[Sequence] = []
        self._num_prompt_tokens = np.zeros(0, dtype=np.int64)
        self.draws = False
        """Whether one of the rows is not greedy."""

    def fill(self, sequences: list[Sequence], num_tokens: np.ndarray, num_rows: int) -> bool:
        """Row i draws the next token of sequences[i], which has num_tokens[i] tokens by then; num_rows: with padding.

        Returns whether the sequences are others than those of the last call.
        """
        changed = sequences != self._sequences  # by identity
        if changed:
            self._take(sequences)
        count = len(sequences)
        self._columns["indices"][:count] = num_tokens - self._num_prompt_tokens
        for name, value in DRAW_PADDING.items():
            self._columns[name][count:num_rows] = value
        return changed

    def _take(self, sequences: Seq[Sequence]) -> None:
        params = [sequence.sampling for sequence in sequences]
        count = len(sequences)
        self._sequences = []  # until all of it is written: what ends this half way must not pass for filled
        self._num_prompt_tokens = np.array([sequence.num_prompt_tokens for sequence in sequences], dtype=np.int64)
        self.draws = not all(one.greedy for one in params)
        self._columns["temperatures"][:count] = [one.temperature for one in params]
        self._columns["top_ks"][:count] = [one.top_k for one in params]
        self._columns["top_ps"][:count] = [one.top_p for one in params]
        self._columns["min_ps"][:count] = [one.min_p for one in params]
        self._columns["seeds"][:count] = np.array([one.seed for one in params], dtype=np.uint64).view(np.int64)
        self._sequences = list(sequences)
