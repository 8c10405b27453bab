"""A mask of bits over rows of logits, in torch."""

from __future__ import annotations

import torch


def token_mask(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """See kernels/token_mask.py."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    for row, one in zip(rows.tolist(), words, strict=True):  # a row at a time: the bits of all would take 32 times the words' memory
        banned = ((one.unsqueeze(1) >> shifts) & 1).flatten()[: logits.shape[1]] == 0
        logits[row].masked_fill_(banned, float("-inf"))
