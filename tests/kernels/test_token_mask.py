"""Masks of bits over logits: the reference, and the Triton kernel in the interpreter or on the GPU, against a loop over tokens."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable.token_mask import token_mask as portable  # noqa: E402
from halfmoon.kernels.token_mask import token_mask  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize("function", [token_mask, portable])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 160, 5000])
def test_a_token_without_its_bit_is_minus_infinity_and_all_else_stays(function: object, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    num_words = -(-vocab_size // 32) + 1  # a row of words may be wider than it has to be
    logits = torch.randn(5, vocab_size, generator=generator)
    logits[3, 0] = float("nan")
    words = torch.randint(-(2**31), 2**31, (2, num_words), generator=generator, dtype=torch.int64).to(torch.int32)
    words[1, 0] = -1 if vocab_size == 1 else words[1, 0]
    rows = [3, 1]
    expected = logits.clone()
    for row, bits in zip(rows, words.tolist(), strict=True):
        for token in range(vocab_size):
            if not bits[token // 32] >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    found = logits.to(DEVICE)
    function(found, torch.tensor(rows, device=DEVICE), words.to(DEVICE))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_no_row_is_no_work() -> None:
    logits = torch.zeros(2, 40, device=DEVICE)
    portable(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, dtype=torch.int32, device=DEVICE))
    assert not logits.any()
