"""Attention of several tokens a sequence over paged KV: prefill chunks, and chunks mixed with decode tokens."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .dispatch import implementation
from .reference import flash_prefill as reference


@overload
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
    sliding_window: int = ...,
    logit_soft_cap: float = ...,
    causal: bool = ...,
    kv_scales: torch.Tensor | None = ...,
    block_mask: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    usual_num_seqs: int | None = ...,
) -> torch.Tensor: ...
@overload
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
    sliding_window: int = ...,
    logit_soft_cap: float = ...,
    causal: bool = ...,
    kv_scales: torch.Tensor | None = ...,
    block_mask: torch.Tensor | None = ...,
    return_lse: Literal[True],
    usual_num_seqs: int | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
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
    kv_scales: torch.Tensor | None = None,
    block_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    usual_num_seqs: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Queries are their sequence's last positions; the KV of the chunk stands in the pages already.

    Args:
        q: [num_tokens, num_heads, head_dim], sequences one after another.
        kv_pages: [2, num_pages, num_kv_heads, page_size, head_dim] of one layer, of q's dtype or float8_e4m3fn; num_heads is a multiple
            of num_kv_heads.
        block_table: int32 [num_seqs, max_pages]; entries beyond a sequence's kv_len are not read.
        cu_seqlens_q: int32 [num_seqs + 1], where each sequence's queries begin.
        kv_lens: int32 [num_seqs], the chunk included; 0: a sequence of no keys, whose rows another kernel writes: they may hold anything.
        max_seqlen_q, max_kv_len: maxima over the sequences.
        sliding_window: 0: none; else a query at position i sees keys j with i - window < j <= i.
        logit_soft_cap: 0: none; else scores become cap * tanh(score / cap).
        causal: False: every query sees all of its sequence's KV (within the window's lower bound).
        kv_scales: fp32 [2, num_kv_heads], contiguous, of keys and of values: what float8_e4m3fn pages hold is value / scale. None: 1.
        block_mask: bool [num_seqs, num_heads or 1, ceil(max_seqlen_q / 64), ceil(max_kv_len / 64)], last dimension contiguous: False where
            64 queries of the chunk, counted from its first, don't see 64 keys, beside what window and causality hide. What is hidden as
            a whole is not computed.
        usual_num_seqs: how many of the sequences have queries in most calls, where a call is captured once and the others are room for
            more; None: all. It chooses between kernels and changes no result.
        return_lse: the logarithm, too, of each query's sum of exp(score), of scaled and capped scores: what merges partial results.

    Returns:
        Like q; with return_lse also fp32 [num_tokens, num_heads]. With block_mask or return_lse, a query that sees no key gets zeros
        and -inf.
    """
    kernel = implementation("flash_prefill", q.device) if q.is_cuda else reference.flash_prefill
    return kernel(
        q, kv_pages, block_table, cu_seqlens_q, kv_lens, max_seqlen_q=max_seqlen_q, max_kv_len=max_kv_len, scale=scale,
        sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, causal=causal, kv_scales=kv_scales, block_mask=block_mask,
        return_lse=return_lse, usual_num_seqs=usual_num_seqs,
    )  # fmt: skip
