"""Linear layers whose weights are int4, dequantised on their way to a product in x's numbers."""

from __future__ import annotations

import torch

from .dispatch import implementation
from .reference import int4_linear as reference


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_len: int,
    way: str = "",
) -> torch.Tensor:
    """x [num_tokens, in], weight int32 [out, in / 8], bias [out]; out [num_tokens, out] in x's dtype, sums in fp32.

    A word holds eight columns, the first in its lowest four bits, each 0 to 15. A weight is (number - zero) · scale.
    scales: [out, in / group_len], 16 or 32 bits; zeros: uint8 likewise, absent: 8. way: of the implementation's
    ways(), which can be had in turn; empty: the likeliest.
    """
    if x.is_cuda:
        return implementation("int4_linear", x.device)(x, weight, scales, zeros, bias, group_len=group_len, way=way)
    return reference.int4_linear(x, weight, scales, zeros, bias, group_len=group_len, way=way)
