"""The Triton sampling kernel against the torch reference: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable import sampling as module  # noqa: E402
from halfmoon.kernels.reference.sampling import sampling as reference  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


def draw(logits: torch.Tensor, temperature, top_k, top_p, min_p, seed, index) -> tuple[list[int], list[int]]:
    """The kernel's tokens and the reference's, from lists of parameters, or scalars for all rows."""

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * len(logits), dtype=dtype)

    arguments = (
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int64),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(index, torch.int64),
    )
    return module.sampling(*(one.to(DEVICE) for one in arguments)).tolist(), reference(*arguments).tolist()


def random_logits(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=12)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
            st.sampled_from([0, 1, 2, 7, 300, 10**6]),
            st.sampled_from([1.0, 0.95, 0.5, 0.01]),
            st.sampled_from([0.0, 0.02, 0.3, 1.0]),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**33),
        ),
        min_size=1,
        max_size=3,
    ),
    vocab_size=st.sampled_from([50, 300, 5000]),
    logit_seed=st.integers(0, 2**31),
)
def test_tokens_are_the_references(rows, vocab_size, logit_seed):
    temperatures, top_ks, top_ps, min_ps, seeds, indices = map(list, zip(*rows, strict=True))
    signed = np.array(seeds, dtype=np.uint64).view(np.int64).tolist()
    found, wanted = draw(random_logits(len(rows), vocab_size, logit_seed), temperatures, top_ks, top_ps, min_ps, signed, indices)
    assert found == wanted


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.4), (4, 0.7), (1, 0.2)])
def test_equal_logits_are_kept_together(top_k, top_p):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.5, 2.0, 2.0, -1.0, 1.0]]).repeat(4, 1)
    found, wanted = draw(logits, 1.0, top_k, top_p, 0.0, 7, list(range(4)))
    assert found == wanted and set(found) <= {0, 1, 2, 4, 5, 7}


def test_a_token_at_minus_infinity_is_never_drawn():
    logits = torch.full((6, 4), float("-inf"))
    logits[:, 1], logits[:, 3] = 0.0, -1.0
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9)):
        found, wanted = draw(logits, 1.0, top_k, top_p, 0.0, 3, list(range(6)))
        assert found == wanted and set(found) == {1, 3}


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1e4 - 1.0, 1e4, -1e4], [3.0, 3.0, 1.0]])
    assert draw(logits, 1e-30, 0, 1.0, 0.0, 0, 4)[0][0] == 1
    assert draw(logits, 0.0, 0, 1.0, 0.0, 0, 4)[0] == [1, 0]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_a_row_with_a_number_that_is_none_gives_no_token_and_its_neighbours_theirs(odd, vocab_size):
    logits = random_logits(4, vocab_size, 2)
    wanted = logits.argmax(dim=-1).tolist()
    logits[1, vocab_size // 2 :] = odd
    logits[1, : vocab_size // 2] = -math.inf
    logits[3, -1], logits[3, 0] = math.nan, math.inf
    for temperature, top_k, top_p, min_p in ((0.0, 0, 1.0, 0.0), (1e-6, 0, 1.0, 0.0), (1e-6, 3, 0.5, 0.1)):
        found, reference_found = draw(logits, temperature, top_k, top_p, min_p, 3, 0)
        assert found == reference_found == [wanted[0], -1, wanted[2], -1]


def test_the_draws_are_the_seeds_and_indices_own():
    """Over logits that are all equal the token is floor(u · vocabulary)."""
    logits = torch.zeros(24, 1000)
    indices = [0, 1, 2**32, 2**40 + 5, *range(100, 120)]
    seeds = [(-1) ** i * (2**61 + i * 12345678901) for i in range(24)]
    found, wanted = draw(logits, 1.0, 0, 1.0, 0.0, seeds, indices)
    assert found == wanted and len(set(found)) > 18


def test_a_vocabulary_too_large_to_count_is_refused():
    with pytest.raises(ValueError, match="above 1044480"):
        module.sampling(torch.zeros(1, 255 * 4096 + 1), *(torch.zeros(1) for _ in range(6)))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_large_vocabulary_draws_as_the_reference_does():
    """fp32 weights of two devices differ in the last bit: a draw that hits an edge of the distribution may move to a neighbour."""
    logits = random_logits(64, 128_256, 11)
    options = ((1.0, 0, 1.0, 0.0), (0.8, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (0.7, 2000, 0.95, 0.01))
    same = 0
    for temperature, top_k, top_p, min_p in options:
        found, wanted = draw(logits, temperature, top_k, top_p, min_p, 99, list(range(64)))
        same += sum(one == other for one, other in zip(found, wanted, strict=True))
    assert same >= 64 * len(options) - 2
