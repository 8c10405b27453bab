"""fp8 (e4m3: sign, 4 bits of exponent, 3 of mantissa, at most 448) in kernels: caches hold it, arithmetic never sees it.

Kernels take such a cache as bytes. A byte becomes an fp16 number exactly; where the GPU has no instruction for that (before sm_89), its
bits are moved to their places in an fp16 number, which is then 2^8 times too small, subnormal ones too.
"""

# What stands in a kernel is Triton's language and not Python's; a type checker follows neither it nor launches.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

NOT_FP8, BY_BITS, BY_INSTRUCTION = 0, 1, 2


@lru_cache
def _way(device: torch.device) -> int:
    return BY_INSTRUCTION if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) else BY_BITS


def readable(kv_pages: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The pages as kernels take them, and their constant FP8: how bytes become numbers, or NOT_FP8."""
    if kv_pages.dtype != torch.float8_e4m3fn:
        return kv_pages, NOT_FP8
    return kv_pages.view(torch.uint8), _way(kv_pages.device)


@triton.jit
def widened(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """Bytes as numbers of dtype, exactly (dtype fp16 or fp32)."""
    if FP8 == 2:
        wide = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = x.to(tl.uint16)
        wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return wide.to(dtype)


@triton.jit
def widened_pairs(words, dtype: tl.constexpr, FP8: tl.constexpr):
    """Words of two bytes (int16) as two tensors of numbers: those of the low bytes, and of the high ones."""
    if FP8 == 2:  # of two words at a time the low bytes are brought together, and the high ones
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $2, $2, 0x3120; mov.b32 {l, h}, t;"
            " cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }",
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        words = words.to(tl.uint16, bitcast=True)
        low = (((words & 0x80) << 8) | ((words & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        high = ((words & 0x8000) | ((words & 0x7F00) >> 1)).to(tl.float16, bitcast=True) * 256.0
    return low.to(dtype), high.to(dtype)


@triton.jit
def beside_fp8(q):
    """Queries as the operand beside widened keys: fp32 as they are, bf16 as fp16, whose eleven bits hold it (saturated at 65,504)."""
    if q.dtype == tl.bfloat16:
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return q


@triton.jit
def narrowed(x):
    """fp32 as e4m3 bytes: the nearest, of two as near the even one, saturated at 448. Integers alone, so any GPU can."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 120 less in the exponent
    # below 2^-6 the numbers stand 2^-9 apart: adding 2^23 leaves their count in the lowest bits
    subnormal = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return (code | tl.where(x < 0, 128, 0)).to(tl.uint8)
