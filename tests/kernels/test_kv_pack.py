"""Pages to block slices and back, in torch and as the Triton kernel: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels import kv_pack as public  # noqa: E402
from halfmoon.kernels.portable import kv_pack as portable  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
SHAPES = [(2, 16, 64), (3, 5, 7), (8, 64, 24)]  # kv heads, page size, head_dim; 105 values of a byte allow no wide word


def numbered(shape: tuple[int, int, int], dtype: torch.dtype, num_pages: int = 6) -> torch.Tensor:
    """Bytes that say where they stand, so that no two pages hold the same."""
    num_bytes = 2 * num_pages * shape[0] * shape[1] * shape[2] * dtype.itemsize
    return torch.randint(0, 64, (num_bytes,), dtype=torch.uint8).view(dtype).view(2, num_pages, *shape).to(DEVICE)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("module", [public, portable], ids=["public", "portable"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_is_k_of_its_page_and_then_v(module, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    cache, pages = numbered(shape, dtype), [4, 0, 3]
    blocks = module.kv_pack(cache, torch.tensor(pages, device=DEVICE))
    assert blocks.shape == (3, 2, *shape) and blocks.dtype == dtype and blocks.is_contiguous()
    for place, page in enumerate(pages):
        assert torch.equal(as_bytes(blocks[place]), as_bytes(cache[:, page]))


@pytest.mark.parametrize("module", [public, portable], ids=["public", "portable"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked_blocks_stand_in_their_pages_and_in_no_others(module, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    cache, other, pages = numbered(shape, dtype), numbered(shape, dtype), [5, 1]
    want = as_bytes(cache).clone()
    want[:, pages] = as_bytes(other)[:, pages]
    index = torch.tensor(pages, device=DEVICE)
    module.kv_unpack(module.kv_pack(other, index), cache, index)
    assert torch.equal(as_bytes(cache), want)


def test_an_odd_address_is_copied_in_narrow_words() -> None:
    storage = torch.arange(2 * 4 * 32 + 1, device=DEVICE).to(torch.uint8).view(torch.float8_e4m3fn)
    cache = storage[1:].view(2, 4, 1, 2, 16)
    blocks = portable.kv_pack(cache, torch.tensor([2], device=DEVICE))
    assert torch.equal(as_bytes(blocks[0]), as_bytes(cache[:, 2]))


def test_no_pages_are_no_blocks() -> None:
    cache, none = numbered((2, 4, 8), torch.float32), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    blocks = portable.kv_pack(cache, none)
    assert blocks.shape == (0, 2, 2, 4, 8)
    portable.kv_unpack(blocks, cache, none)


def test_blocks_of_another_shape_or_dtype_are_refused() -> None:
    cache, index = numbered((2, 4, 8), torch.float32), torch.tensor([1], device=DEVICE)
    for blocks in (torch.zeros(2, 2, 2, 4, 8), torch.zeros(1, 2, 2, 4, 8, dtype=torch.float16), torch.zeros(1, 2, 2, 8, 4)):
        with pytest.raises(ValueError, match="these pages take"):
            public.kv_unpack(blocks.to(DEVICE), cache, index)
