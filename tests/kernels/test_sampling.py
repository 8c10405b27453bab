"""The sampling kernel against a plain reference: one row at a time, in Python's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.kernels.sampling import NO_TOKEN, likeliest, sampling

VOCAB_SIZE = 50


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, index=0):
    """sampling() with scalars or lists for a batch of logits [n, vocab]."""
    count = len(logits)

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype)

    return sampling(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int64),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(index, torch.int64),
    )


def philox_uniform(seed: int, index: int) -> float:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = index & 0xFFFFFFFF, index >> 32, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 << 32 | c1) >> 11) / 2**53


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Probabilities by the definitions, filter after filter."""
    largest = max(logits)
    weights = {token: math.exp((logit - largest) / temperature) for token, logit in enumerate(logits)}
    if top_k:
        smallest = sorted(weights.values(), reverse=True)[: min(top_k, len(weights))][-1]
        weights = {token: weight for token, weight in weights.items() if weight >= smallest}
    total, so_far, nucleus = sum(weights.values()), 0.0, {}
    for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
        if so_far >= top_p * total:
            break
        so_far += weight
        nucleus[token] = weight
    kept = {token: weight for token, weight in nucleus.items() if weight >= min_p * max(nucleus.values())}
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, float("-inf")]])
    assert draw(logits, temperature=0.0, top_k=2, top_p=0.1).tolist() == [1, 0]


@settings(max_examples=150)
@given(
    data=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
            st.sampled_from([0, 1, 2, 7, VOCAB_SIZE, 10**6]),
            st.sampled_from([1.0, 0.95, 0.5, 0.01]),
            st.sampled_from([0.0, 0.02, 0.3, 1.0]),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**33),
        ),
        min_size=1,
        max_size=6,
    ),
    logit_seed=st.integers(0, 2**31),
)
def test_every_row_is_the_inverse_of_its_own_filtered_distribution(data, logit_seed):
    logits = torch.randn(len(data), VOCAB_SIZE, generator=torch.Generator().manual_seed(logit_seed)) * 3
    temperatures, top_ks, top_ps, min_ps, seeds, indices = map(list, zip(*data, strict=True))
    signed = np.array(seeds, dtype=np.uint64).view(np.int64).tolist()
    tokens = draw(logits, temperatures, top_ks, top_ps, min_ps, signed, indices).tolist()
    for row, (temperature, top_k, top_p, min_p, seed, index) in enumerate(data):
        values = logits[row].tolist()
        if temperature == 0.0:
            assert tokens[row] == values.index(max(values))
            continue
        cumulated = np.cumsum(distribution(values, temperature, top_k, top_p, min_p))
        u = philox_uniform(seed, index)
        # fp32 weights move an edge of the cumulated distribution by some 1e-6
        assert tokens[row] in {int(np.searchsorted(cumulated, u + shift, side="right")) for shift in (-1e-5, 0.0, 1e-5)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.25},
        {"temperature": 0.5, "top_k": 6, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_draws_follow_the_distribution(options):
    """Pearson's chi-square over 20,000 draws of one seed; the limit is exceeded by chance once in 10,000."""
    num_draws = 20_000
    logits = [1.5, 0.0, -0.5, 2.0, 1.0, 0.3, -2.0, 1.2]
    tokens = draw(torch.tensor(logits).expand(num_draws, -1), seed=1234, index=list(range(num_draws)), **options)
    counts = torch.bincount(tokens, minlength=len(logits)).double().numpy()
    wanted = np.array(distribution(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options})) * num_draws
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    chi_square = float(((counts - wanted)[possible] ** 2 / wanted[possible]).sum())
    limits = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}  # by degrees of freedom
    assert chi_square < limits[int(possible.sum()) - 1]


def test_a_rows_token_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 3000, generator=generator)
    temperatures = [(0.0, 0.8, 1.3)[row % 3] for row in range(40)]
    # 2,000 is beyond what is selected without a sort, so the batch takes another way than most rows alone
    top_ks, top_ps = [(0, 5, 2000, 50)[row % 4] for row in range(40)], [(1.0, 0.9, 0.3)[row % 3] for row in range(40)]
    min_ps, indices = [(0.0, 0.05)[row % 2] for row in range(40)], [row * 7 for row in range(40)]
    together = draw(logits, temperatures, top_ks, top_ps, min_ps, 99, indices).tolist()
    for row in range(40):
        alone = draw(logits[row : row + 1], temperatures[row], top_ks[row], top_ps[row], min_ps[row], 99, indices[row])
        assert alone.tolist() == [together[row]]


def test_a_token_at_minus_infinity_is_never_drawn():
    logits = torch.full((500, 4), float("-inf"))
    logits[:, 1], logits[:, 3] = 0.0, -1.0
    assert set(draw(logits, seed=3, index=list(range(500))).tolist()) == {1, 3}


def test_a_tiny_temperature_is_greedy_and_not_a_number_out_of_range():
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    assert draw(logits, temperature=1e-30, index=4).tolist() == [0]
    assert draw(logits, temperature=1e-44, top_p=0.5, index=4).tolist() == [0]


@pytest.mark.parametrize(("u", "wanted"), [(0.0, 2), (1.0 - 2.0**-53, 5)])
def test_the_ends_of_the_unit_interval_draw_tokens_of_some_weight(u, wanted, monkeypatch):
    """Cut tokens stand at both ends of the vocabulary; neither is drawn, whatever u is."""
    monkeypatch.setattr("halfmoon.kernels.reference.sampling.uniform", lambda seeds, indices: np.full(len(seeds), u))
    logits = torch.tensor([[-5.0, -5.0, 1.0, 1.5, -5.0, 1.2, -5.0, -5.0]]).repeat(3, 1)
    assert draw(logits, top_k=3).tolist() == [wanted] * 3


@pytest.mark.parametrize("vocab_size", [7, 64, 1000, 4096])
def test_the_likeliest_token_is_the_first_of_equals(vocab_size):
    logits = torch.randint(-3, 3, (9, vocab_size), generator=torch.Generator().manual_seed(vocab_size)).float()
    wanted = [row.index(max(row)) for row in logits.tolist()]
    assert likeliest(logits).tolist() == wanted
    feed = torch.full((12,), -1)
    likeliest(logits, out=feed[:9])
    assert feed.tolist() == [*wanted, -1, -1, -1]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("vocab_size", [7, 256])
def test_a_row_with_a_number_that_is_none_gives_no_token_and_its_neighbours_theirs(odd, vocab_size):
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1))
    wanted = logits.argmax(dim=-1).tolist()
    logits[1, vocab_size // 2] = odd
    logits[3] = float("-inf")
    expected = [wanted[0], NO_TOKEN, wanted[2], NO_TOKEN]
    assert likeliest(logits).tolist() == expected
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 2000, "top_p": 0.9}):
        assert draw(logits, temperature=0.0, **options).tolist() == expected
        assert draw(logits, temperature=[1e-6, 1.0, 1e-6, 1.0], **options).tolist() == expected
