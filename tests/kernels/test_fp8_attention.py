"""Attention over fp8 caches: against fp64 on the numbers that the cache holds, and against what it would be without rounding."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from halfmoon.kernels import flash_prefill as public_prefill  # noqa: E402
from halfmoon.kernels import paged_decode as public_decode  # noqa: E402
from halfmoon.kernels.portable import flash_prefill as portable_prefill  # noqa: E402
from halfmoon.kernels.portable import fp8  # noqa: E402
from halfmoon.kernels.portable import paged_decode as portable_decode  # noqa: E402
from halfmoon.kernels.portable.widen import widened_pages  # noqa: E402
from halfmoon.kernels.reference.fp8 import to_pages  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
SCALES = torch.tensor([[0.25, 1.5], [3.0, 0.02]])  # keys, values; of two heads


@triton.jit
def _convert(x_ptr, codes_ptr, back_ptr, COUNT: tl.constexpr, FP8: tl.constexpr):
    at = tl.arange(0, COUNT)
    codes = fp8.narrowed(tl.load(x_ptr + at))
    tl.store(codes_ptr + at, codes)
    tl.store(back_ptr + at, fp8.widened(codes, tl.float32, FP8))


def convert(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, back = torch.zeros(len(x), dtype=torch.uint8, device=DEVICE), torch.zeros(len(x), device=DEVICE)
    _convert[(1,)](x.to(DEVICE), codes, back, COUNT=len(x), FP8=fp8.readable(torch.zeros(1, dtype=E4M3, device=DEVICE))[1])
    return codes.cpu(), back.cpu()


def test_every_code_is_the_nearest_to_itself_and_to_what_lies_around_it() -> None:
    numbers = torch.arange(256).to(torch.uint8).view(E4M3).float()
    numbers = torch.where(numbers.isnan(), 0.0, numbers)
    around = torch.stack([numbers * (1 + step) for step in (0.0, 1e-3, -1e-3, 0.05, -0.05)]).reshape(-1)
    middles = (numbers[:126] + numbers[1:127]) / 2  # as near to both: the even one
    far = torch.tensor([449.0, 460.0, 1e6, 3e38, -1e6, 1e-9, -1e-9])
    x = torch.cat((around, middles, -middles, far))
    x = torch.cat((x, torch.zeros(2048 - len(x))))
    codes, back = convert(x)
    want = to_pages(x.view(-1, 1), E4M3, None).view(-1)
    assert torch.equal(back, want.float())
    assert torch.equal(codes & 0x7F, want.view(torch.uint8) & 0x7F)  # the sign of a zero is nobody's business


def narrowed(inputs, scales: torch.Tensor | None):
    """The inputs with an fp8 cache of the same values; and with a dense K and V of what that cache holds."""
    k_scales, v_scales = (None, None) if scales is None else scales.unbind(0)
    pages = torch.stack(
        [
            to_pages(side.transpose(1, 2), E4M3, of).transpose(1, 2)
            for side, of in zip(inputs.kv_pages.float(), (k_scales, v_scales), strict=True)
        ]
    )
    held = []
    for k, v in inputs.dense:
        kept = [to_pages(x, E4M3, of).double() for x, of in ((k, k_scales), (v, v_scales))]
        factors = [1.0, 1.0] if scales is None else [of.double()[:, None] for of in scales]
        held.append((kept[0] * factors[0], kept[1] * factors[1]))
    return pages, type(inputs)(**{**inputs.__dict__, "dense": held})


def relative(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.cpu().double() - want).norm() / want.norm())


def on_device(inputs, pages: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(DEVICE) for x in (inputs.q, pages, inputs.block_table)]


def prefill(function: Callable, inputs, pages, scales, **options):
    return function(
        *on_device(inputs, pages), inputs.cu_seqlens_q.to(DEVICE), inputs.kv_lens.to(DEVICE), max_seqlen_q=inputs.max_seqlen_q,
        max_kv_len=inputs.max_kv_len, kv_scales=scales.to(DEVICE) if scales is not None else None, **options,
    )  # fmt: skip


def decode(function: Callable, inputs, pages, scales, **options):
    return function(
        *on_device(inputs, pages), inputs.kv_lens.to(DEVICE), max_kv_len=inputs.max_kv_len,
        kv_scales=scales.to(DEVICE) if scales is not None else None, **options,
    )  # fmt: skip


CASES = [(torch.float16, None, {}), (torch.float16, SCALES, {"sliding_window": 20}), (torch.float32, SCALES, {"logit_soft_cap": 2.0})]


@pytest.mark.parametrize("module", [public_prefill, portable_prefill], ids=["public", "portable"])
@pytest.mark.parametrize(("dtype", "scales", "options"), CASES, ids=["plain", "scales+window", "scales+cap"])
def test_prefill_reads_what_an_fp8_cache_holds(module, dtype, scales, options, paged, naive_attention) -> None:
    inputs = paged([17, 3], [40, 35], (4, 2), 64, 16, dtype)
    pages, held = narrowed(inputs, scales)
    out = prefill(module.flash_prefill, inputs, pages, scales, scale=0.125, **options)
    assert relative(out, naive_attention(held, 0.125, **options)) < TOLERANCE[dtype]
    # e4m3 is within 2^-4 of a value, and rounding averages out over the keys
    assert relative(out, naive_attention(inputs, 0.125, **options)) < 0.05


@pytest.mark.parametrize("module", [public_decode, portable_decode], ids=["public", "portable"])
@pytest.mark.parametrize(("dtype", "scales", "options"), CASES, ids=["plain", "scales+window", "scales+cap"])
def test_decode_reads_what_an_fp8_cache_holds(module, dtype, scales, options, paged, naive_attention) -> None:
    inputs = paged([1, 1], [70, 150], (4, 2), 64, 16, dtype)
    pages, held = narrowed(inputs, scales)
    out = decode(module.paged_decode, inputs, pages, scales, scale=0.125, **options)
    assert relative(out, naive_attention(held, 0.125, **options)) < TOLERANCE[dtype]
    assert relative(out, naive_attention(inputs, 0.125, **options)) < 0.05


@pytest.mark.parametrize(("dtype", "scales", "options"), CASES, ids=["plain", "scales+window", "scales+cap"])
def test_several_query_tokens_read_what_an_fp8_cache_holds(dtype, scales, options, paged, naive_attention) -> None:
    inputs = paged([4, 3], [150, 3], (4, 2), 64, 16, dtype)
    pages, held = narrowed(inputs, scales)
    nobody = inputs.q[:1]  # a token before the second sequence's first: it sees no key
    several = type(inputs)(**{**inputs.__dict__, "q": torch.cat((inputs.q[:4], nobody, inputs.q[4:])).view(2, 4, 4, 64)})
    out = decode(portable_decode.paged_decode, several, pages, scales, scale=0.125, **options).cpu().flatten(0, 1)
    assert out[4].eq(0).all()
    assert relative(torch.cat((out[:4], out[5:])), naive_attention(held, 0.125, **options)) < TOLERANCE[dtype]


def test_widened_pages_hold_the_same_numbers_side_by_side(paged) -> None:
    inputs = paged([1, 1, 1], [33, 5, 16], (2, 2), 64, 16, torch.float32)
    pages, held = narrowed(inputs, SCALES)
    wide, table = widened_pages(
        pages.to(DEVICE), inputs.block_table.to(DEVICE), inputs.kv_lens.to(DEVICE), SCALES.to(DEVICE), 33, torch.float16
    )
    assert table.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for row, (k, v) in zip(table.long().cpu(), held.dense, strict=True):
        dense = wide.cpu()[:, row].transpose(2, 3).reshape(2, -1, 2, 64)[:, : len(k)]
        torch.testing.assert_close(dense.double(), torch.stack((k, v)), rtol=1e-3, atol=1e-7)
