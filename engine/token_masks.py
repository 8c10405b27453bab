"""Masks of the tokens that a step's sequences may get, made on a thread beside the forward pass.

begin(sequences) ─► thread: a row of bits for each sequence with a grammar ─► result(), once the logits are there ─► kernels/token_mask
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .sequence import Sequence


class TokenMasks(NamedTuple):
    rows: list[int]  # of the logits
    words: np.ndarray  # int32 [len(rows), ceil(vocab_size / 32)]: a bit for each token


class MaskMaker:
    def __init__(self, vocab_size: int, name: str) -> None:
        self._num_words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, name)

    def begin(self, sequences: Seq[Sequence]) -> Future[TokenMasks] | None:
        """sequences: in the order of their logits; their tokens must not change before the result is there. None: no grammar."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None]
        return self._thread.submit(make_masks, sequences, rows, self._num_words) if rows else None

    def close(self) -> None:
        self._thread.shutdown()


def make_masks(sequences: Seq[Sequence], rows: list[int], num_words: int) -> TokenMasks:
    """Raises ValueError for tokens that are not within their grammar."""
    words = np.empty((len(rows), num_words), dtype=np.int32)
    for row, target in zip(rows, words, strict=True):
        sequence = sequences[row]
        assert sequence.grammar is not None
        sequence.grammar.fill(sequence.token_ids[sequence.num_prompt_tokens :], target)
    return TokenMasks(rows, words)
