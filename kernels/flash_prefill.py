"""Attention of several tokens a sequence over paged KV: prefill chunks, and chunks mixed with decode tokens."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import flash_prefill as reference


def flash_prefill(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_kv_len: int,
    scale: float,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """Queries are their sequence's last positions; the KV of the chunk stands in the pages already.

    Args:
        q: [num_tokens, num_heads, head_dim], sequences one after another.
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer; num_heads is a multiple of num_kv_heads.
        block_table: int32 [num_seqs, max_pages]; entries beyond a sequence's kv_len are not read.
        cu_seqlens_q: int32 [num_seqs + 1], where each sequence's queries begin.
        kv_lens: int32 [num_seqs], the chunk included.
        max_seqlen_q, max_kv_len: maxima over the sequences.
        sliding_window: 0: none; else a query at position i sees keys j with i - window < j <= i.
        logit_soft_cap: 0: none; else scores become cap * tanh(score / cap).
        causal: False: every query sees all of its sequence's KV (within the window's lower bound).

    Returns:
        Like q.
    """
    kernel = implementation("flash_prefill", q.device) if q.is_cuda else reference.flash_prefill
    return kernel(
        q,
        kv_pages,
        block_table,
        cu_seqlens_q,
        kv_lens,
        max_seqlen_q=max_seqlen_q,
        max_kv_len=max_kv_len,
        scale=scale,
        sliding_window=sliding_window,
        logit_soft_cap=logit_soft_cap,
        causal=causal,
    )
