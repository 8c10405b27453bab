"""Linear layers whose weights and inputs are fp8 (e4m3) or int8. Inputs are quantised as they come: the largest of a token becomes the
type's largest number, or the largest of a token's group where weights are scaled by blocks."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import narrow_linear as reference


def narrow_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    row_block: int,
    group_len: int,
    way: str = "",
) -> torch.Tensor:
    """x [num_tokens, in], weight e4m3 or int8 [out, in], bias [out]; out [num_tokens, out] in x's dtype, sums in fp32 or int32.

    scales: fp32 [ceil(out / row_block), groups], group_len columns each, and the last what is left; one group: by channel, group_len of
    no matter. int8 has one group. way: of the implementation's ways(), which can be had in turn; empty: the likeliest.
    """
    if x.is_cuda:
        return implementation("narrow_linear", x.device)(x, weight, scales, bias, row_block=row_block, group_len=group_len, way=way)
    return reference.narrow_linear(x, weight, scales, bias, row_block=row_block, group_len=group_len, way=way)
