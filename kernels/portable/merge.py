"""Attention over parts of the keys, merged: each part comes with the logarithm of what its softmax summed up.

part 0   out, lse ─┐
part 1   out, lse ─┼─► Σ out · 2^(lse − max) / Σ 2^(lse − max)
...                ┘
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
MOST_SPLITS = 32


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    parts_ptr, parts_lse_ptr, out_ptr, lse_ptr, num_rows, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    lse = tl.load(parts_lse_ptr + splits.to(tl.int64) * num_rows + row, mask=splits < num_splits, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that sees no key
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, axis=0)
    at = parts_ptr + (splits.to(tl.int64)[:, None] * num_rows + row) * HEAD_DIM + columns[None, :]
    parts = tl.load(at, mask=(splits < num_splits)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, (base + tl.log2(total)) * LN_2)


def merge_splits(parts: torch.Tensor, parts_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills out [num_tokens, num_heads, head_dim] and lse [num_tokens, num_heads], natural, where it is wanted.

    parts fp32 [num_splits, *out.shape], MOST_SPLITS at most, each with a softmax of its own; parts_lse fp32
    [num_splits, num_tokens, num_heads], in units of log2, -inf where a part holds no key; its values must be finite there all the same.
    """
    num_rows, head_dim = out.shape[0] * out.shape[1], out.shape[2]
    _merge_kernel[(num_rows,)](
        parts, parts_lse, out, lse, num_rows, parts.shape[0], HEAD_DIM=head_dim,
        BLOCK_S=MOST_SPLITS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
