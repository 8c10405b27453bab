"""Bans tokens by a bit each: a program reads the words of a part of a row and writes -inf where a bit is 0. Nothing else is written.

words [m, W] ─► 32 bits of a word ─► logits[rows[i], 32·w + bit] = -inf
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _token_mask_kernel(logits_ptr, rows_ptr, words_ptr, stride_logits, stride_words, vocab_size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + at)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    words = tl.load(words_ptr + at * stride_words + tokens // 32, mask=inside, other=-1)
    banned = ((words >> (tokens % 32)) & 1) == 0
    tl.store(logits_ptr + row * stride_logits + tokens, float("-inf"), mask=inside & banned)


def token_mask(logits: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> None:
    """See kernels/token_mask.py: logits of any float dtype, last dimension contiguous."""
    vocab_size = logits.shape[1]
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab_size)))
    if len(rows):
        _token_mask_kernel[(len(rows), triton.cdiv(vocab_size, block))](
            logits, rows, words, logits.stride(0), words.stride(0), vocab_size, BLOCK=block, num_warps=4
        )
