"""The Triton products with quantised weights: in the interpreter where there is no GPU, on the GPU else. Each against the reference on
the same numbers, which tests/engine/test_linears.py holds to what they mean."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable import int4_linear as portable_int4  # noqa: E402
from halfmoon.kernels.portable import narrow_linear as portable_narrow  # noqa: E402
from halfmoon.kernels.portable.narrow_tokens import narrow_tokens  # noqa: E402
from halfmoon.kernels.reference.int4_linear import int4_linear  # noqa: E402
from halfmoon.kernels.reference.narrow_linear import narrow_linear  # noqa: E402
from halfmoon.kernels.reference.quantized import dequantized, quantized_tokens  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
NARROW = [torch.float8_e4m3fn, torch.int8]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(num_tokens: int, num_in: int, dtype: torch.dtype) -> torch.Tensor:
    """Of sizes far apart, one of zeros."""
    x = random(num_tokens, num_in, seed=1) * torch.logspace(-2, 2, num_tokens)[:, None]
    if num_tokens > 1:
        x[num_tokens // 2] = 0
    return x.to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """By token, whose sizes differ."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    error, size = (found.double() - wanted.double()).norm(dim=1), wanted.double().norm(dim=1)
    assert bool((error <= TOLERANCE[found.dtype] * size).all()), (error / size).tolist()


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize(("num_in", "group_len"), [(40, 40), (1100, 1100), (300, 128)])
def test_tokens_are_rounded_as_in_the_reference(num_in, group_len, narrow):
    x = tokens(5, num_in, torch.float16)
    found, scales = (one.cpu() for one in narrow_tokens(x.to(DEVICE), narrow, group_len))
    wanted, wanted_scales = quantized_tokens(x, narrow, group_len)
    assert torch.equal(scales, wanted_scales) and torch.equal(found.float(), wanted.float())


def narrow_case(num_out: int, num_in: int, narrow: torch.dtype, blocked: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    weight = random(num_out, num_in) * (30 if narrow == torch.int8 else 1)
    shape = (-(-num_out // 128), -(-num_in // 128)) if blocked else (num_out, 1)
    scales = (random(*shape).abs() + 0.1) / (30 if narrow == torch.int8 else 1)
    return weight.round().to(narrow) if narrow == torch.int8 else weight.to(narrow), scales, 128 if blocked else 1


@pytest.mark.parametrize("dtype", [DTYPES[0], *DTYPES[2:]])
@pytest.mark.parametrize(("narrow", "blocked"), [(torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True), (torch.int8, False)])
@pytest.mark.parametrize(("num_tokens", "num_out", "num_in"), [(1, 40, 64), (1, 130, 300), (3, 70, 300), (20, 130, 256)])
def test_narrow_products_are_the_references(num_tokens, num_out, num_in, narrow, blocked, dtype):
    weight, scales, row_block = narrow_case(num_out, num_in, narrow, blocked)
    x, bias = tokens(num_tokens, num_in, dtype), random(num_out, seed=3).to(dtype) if num_out == 130 else None
    options = {"row_block": row_block, "group_len": 128 if blocked else num_in}
    wanted = narrow_linear(x, weight, scales, bias, **options)
    given = (x.to(DEVICE), weight.to(DEVICE), scales.to(DEVICE), None if bias is None else bias.to(DEVICE))
    for way in portable_narrow.ways(*given[:3]):
        close(portable_narrow.narrow_linear(*given, **options, way=way).cpu(), wanted)


def test_blocks_of_another_length_are_refused():
    x, weight = torch.zeros(1, 64), torch.zeros(8, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="columns of a block are 32; the kernels know 128"):
        portable_narrow.narrow_linear(x, weight, torch.ones(8, 2), row_block=1, group_len=32)


def int4_case(num_out: int, num_in: int, group_len: int, zeros: bool, scale: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (num_out, num_in // 8), generator=generator).to(torch.int32)
    shape = (num_out, num_in // group_len)
    middle = torch.randint(0, 16, shape, generator=generator).to(torch.uint8) if zeros else None
    return words, (random(*shape).abs() + 0.1).to(scale), middle  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_out", "num_in", "group_len"),
    [(1, 40, 64, 64), (1, 37, 384, 128), (3, 70, 96, 32), (20, 37, 256, 128), (2, 9, 48, 48), (2, 9, 40, 8)],
)
def test_int4_products_are_the_references(num_tokens, num_out, num_in, group_len, zeros, dtype):
    words, scales, middle = int4_case(num_out, num_in, group_len, zeros, dtype)
    x, bias = tokens(num_tokens, num_in, dtype), random(num_out, seed=3).to(dtype) if num_out == 37 else None
    wanted = int4_linear(x, words, scales, middle, bias, group_len=group_len)
    given = [None if one is None else one.to(DEVICE) for one in (x, words, scales, middle, bias)]
    for way in portable_int4.ways(given[0], given[1], group_len):
        found = portable_int4.int4_linear(*given, group_len=group_len, way=way).cpu()  # type: ignore[arg-type]
        if way == "dequantized":  # a weight is rounded to x's type
            assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 2 * TOLERANCE[dtype]
        else:
            close(found, wanted)


def test_dequantized_weights_are_the_references():
    words, scales, middle = int4_case(9, 272, 16, True, torch.float32)
    found = portable_int4.dequantized(words.to(DEVICE), scales.to(DEVICE), middle.to(DEVICE), 16, torch.float32).cpu()
    assert torch.equal(found, dequantized(words, scales, middle, 1, 16))


def test_a_group_of_eight_has_no_tiles():
    words, *_ = int4_case(9, 40, 8, False, torch.float32)
    assert portable_int4.ways(torch.zeros(2, 40), words, 8) == ["dequantized"]
    assert portable_int4.ways(torch.zeros(1, 40), words, 8) == ["token", "dequantized"]
