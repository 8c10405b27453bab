"""Quantised products beside bf16's: fp8 by row and by block, int8 and int4 in each way that they can be had, at the shapes of an 8B model.

    halfmoon bench quantized [--check] [--quick] [--out FILE]

--check: every way against fp64 on its own quantised numbers, at odd and even sizes, first; nothing is timed where one is wrong. Rates
count bf16's operations and bytes for all, so that they compare. Each time is of a graph of products over matrices that
together are larger than the L2 cache. "fp8 fast" is torch's product with fast accumulation, which the engine does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import measure
import torch
from measure import Case, Row

from halfmoon.engine.linears import DenseLinear, Linear, NarrowLinear
from halfmoon.engine.quantize import quantize
from halfmoon.kernels.portable.narrow_tokens import narrow_tokens

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_BATCHES = (1, 8, 32, 128, 512, 2048)
COLD_BYTES = 256 * 2**20
BF16 = torch.bfloat16
LIMITS = {"fp8": 4e-3, "fp8 blocks": 4e-3, "int8": 4e-3, "int4": 4e-3}
"""Of ‖out − reference‖ / ‖reference‖: bf16 rounds the result to 2^-9. Weights that were dequantised to bf16 may have twice as much."""


def blocks(weight: torch.Tensor) -> NarrowLinear:
    """weight [out, in], both multiples of 128, as fp8 with a scale a block of 128x128."""
    num_out, num_in = weight.shape
    tiles = weight.float().view(num_out // 128, 128, num_in // 128, 128)
    scales = tiles.abs().amax(dim=(1, 3)) / 448
    numbers = (tiles / scales[:, None, :, None]).view(num_out, num_in).to(torch.float8_e4m3fn)
    return NarrowLinear(weight=numbers, scales=scales, group_len=128, row_block=128)


MADE: dict[str, Callable[[torch.Tensor], Linear]] = {
    "fp8": partial(quantize, kind="fp8"),
    "fp8 blocks": blocks,
    "int8": partial(quantize, kind="int8"),
    "int4": partial(quantize, kind="int4"),
}


def exact(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """fp64 over the numbers that weights and rounded inputs stand for."""
    if isinstance(linear, NarrowLinear):
        groups = x.float().split(128 if linear.scales.shape[1] > 1 else x.shape[1], dim=1)
        x = torch.cat([rounded(group, linear.weight.dtype) for group in groups], dim=1)
    return x.double() @ linear.dequantized().double().t()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / (127 if dtype == torch.int8 else 448)
    return ((x / scale).round() if dtype == torch.int8 else (x / scale).to(dtype).float()) * scale


def check(seed: int) -> list[Row]:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = []
    for num_out, num_in in ((256, 128), (1152, 896), (6144, 4096)):
        weight = (torch.randn(num_out, num_in, device="cuda", generator=generator) / num_in**0.5).to(BF16)
        for name, make in MADE.items():
            linear = make(weight)
            for num_tokens in (1, 3, 16, 17, 100, 300):
                x = torch.randn(num_tokens, num_in, device="cuda", generator=generator).to(BF16)
                wanted = exact(linear, x)
                errors = {way: measure.relative_error(linear.product(x, way), wanted) for way in linear.candidates(x)}
                rows.append(measure.checked(f"{name} {num_tokens} x {num_in} -> {num_out}", errors, LIMITS[name]))
    return rows


def product(shape: str, num_tokens: int) -> Row:
    num_out, num_in = SHAPES[shape]
    x = torch.randn(num_tokens, num_in, device="cuda").to(BF16)
    weight = (torch.randn(num_out, num_in, device="cuda") / num_in**0.5).to(BF16)
    calls: measure.Calls = {}
    counts: dict[str, int] = {}
    arms: dict[str, str] = {}  # by label
    for name, make in {"bf16": lambda weight: DenseLinear(weight=weight), **MADE}.items():
        first = make(weight)
        num_bytes = sum(tensor.nbytes for tensor in first.tensors())
        # quantised anew each time: an own copy, which the cache does not hold
        linears = [first, *(make(weight.clone()) for _ in range(min(7, COLD_BYTES // num_bytes)))]
        for way in first.candidates(x):
            label = f"{name} {way}".strip()
            counts[label], arms[label] = len(linears), name
            calls[label] = measure.captured(*(partial(linear.product, x, way) for linear in linears))
        if name == "fp8" and "torch" in first.candidates(x):
            counts["fp8 fast"] = len(linears)
            calls["fp8 fast"] = measure.captured(*(partial(fast, x, linear) for linear in linears if isinstance(linear, NarrowLinear)))
    times = {label: ms / counts[label] for label, ms in measure.interleaved(calls).items()}
    best = {name: min(times[label] for label, arm in arms.items() if arm == name) for name in ("bf16", *MADE)}
    ratios = {f"{name} / bf16": ms / best["bf16"] for name, ms in best.items() if name != "bf16"}
    num_bytes = weight.nbytes + x.nbytes + 2 * num_tokens * num_out
    return measure.timed(
        "quantized", f"{shape} {num_tokens}", 2.0 * num_tokens * num_out * num_in, num_bytes, times, compute=num_tokens >= 256, **ratios
    )


def fast(x: torch.Tensor, linear: NarrowLinear) -> torch.Tensor:
    tokens, scales = narrow_tokens(x, linear.weight.dtype, x.shape[1])
    weight = linear.weight.t()
    return torch._scaled_mm(tokens, weight, scales, linear.scales.t(), out_dtype=x.dtype, use_fast_accum=True)  # pyright: ignore[reportPrivateImportUsage]


def cases(quick: bool) -> list[Case]:
    return [
        Case("quantized", f"{shape} {num_tokens}", partial(product, shape, num_tokens))
        for shape in (("qkv", "down") if quick else SHAPES)
        for num_tokens in (QUICK_BATCHES if quick else BATCHES)
    ]


if __name__ == "__main__":
    measure.main(__doc__, cases, check)
