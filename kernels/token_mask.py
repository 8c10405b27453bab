"""Bans tokens from rows of logits, by a bit for each token."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import token_mask as reference


def token_mask(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """In place: -inf where a token's bit is 0; all else stays as it is, NaN too.

    Args:
        logits: fp32 [n, vocab_size].
        rows: int64 [m], of logits, each one once.
        words: int32 [m, ceil(vocab_size / 32)] or wider: token t of rows[i] has bit t % 32 of words[i, t // 32].
    """
    if logits.is_cuda:
        implementation("token_mask", logits.device)(logits, rows, words)
    else:
        reference.token_mask(logits, rows, words)
