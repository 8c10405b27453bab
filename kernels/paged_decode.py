"""Attention of one token a sequence over paged KV."""

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
) -> torch.Tensor:
    """The query is its sequence's last position; its KV stands in the pages already.

    Args:
        q: [num_seqs, num_heads, head_dim].
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer; num_heads is a multiple of num_kv_heads.
        block_table: int32 [num_seqs, max_pages]; any valid page may stand beyond a sequence's kv_len.
        kv_lens: int32 [num_seqs], the query's token included; 0: a padding row, whose output is 0.
        max_kv_len: at least the longest.
        sliding_window: 0: none; else the last sliding_window keys are seen.
        logit_soft_cap: 0: none; else scores become cap * tanh(score / cap).

    Returns:
        Like q.
    """
    kernel = implementation("paged_decode", q.device) if q.is_cuda else reference.paged_decode
    return kernel(
        q, kv_pages, block_table, kv_lens, max_kv_len=max_kv_len, scale=scale, sliding_window=sliding_window, logit_soft_cap=logit_soft_cap
    )
