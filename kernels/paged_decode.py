"""Attention of one token a sequence, or a few, over paged KV."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import paged_decode as reference


def paged_decode(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The queries are their sequence's last positions; their KV stands in the pages already.

    Args:
        q: [num_seqs, num_heads, head_dim]; or [num_seqs, num_q, num_heads, head_dim], several tokens each, causal among themselves.
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer, of q's dtype or float8_e4m3fn; num_heads is a multiple
            of num_kv_heads.
        block_table: int32 [num_seqs, max_pages]; any valid page may stand beyond a sequence's kv_len.
        kv_lens: int32 [num_seqs], the queries' tokens included; 0: a padding row, whose output is 0.
        max_kv_len: at least the longest.
        sliding_window: 0: none; else a query sees the last sliding_window keys up to its own.
        logit_soft_cap: 0: none; else scores become cap * tanh(score / cap).
        kv_scales: fp32 [2, num_kv_heads], contiguous, of keys and of values: what float8_e4m3fn pages hold is value / scale. None: 1.
        out: like q, contiguous; the result is written there, and rows of sequences of length 0 keep what they hold.

    Returns:
        Like q; out, where it is given.
    """
    kernel = implementation("paged_decode", q.device) if q.is_cuda else reference.paged_decode
    return kernel(
        q, kv_pages, block_table, kv_lens, max_kv_len=max_kv_len, scale=scale, sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap, kv_scales=kv_scales, out=out,
    )  # fmt: skip
