from __future__ import annotations

import numpy as np
import pytest

from halfmoon.kernels.reference.philox import philox4x32, uniform

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_known_answers_of_random123_one_by_one_and_in_a_batch():
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], dtype=np.uint64)
    keys = np.array([words(key) for _, key, _ in KNOWN_ANSWERS], dtype=np.uint64)
    wanted = [words(result) for _, _, result in KNOWN_ANSWERS]
    assert philox4x32(counters, keys).tolist() == wanted
    assert [philox4x32(counters[i : i + 1], keys[i : i + 1])[0].tolist() for i in range(3)] == wanted


def test_uniform_reads_seed_and_index_low_word_first():
    seed, index = np.uint64(0x299F31D0A4093822), np.uint64(7 + (5 << 32))
    result = philox4x32(np.array([[7, 5, 0, 0]], dtype=np.uint64), np.array([[0xA4093822, 0x299F31D0]], dtype=np.uint64))[0].tolist()
    wanted = ((result[0] << 32 | result[1]) >> 11) / 2**53
    assert uniform(np.array([seed]), np.array([index]))[0] == wanted


def test_uniform_is_flat_below_one_and_without_repetition():
    draws = uniform(np.full(20_000, 2**64 - 1, dtype=np.uint64), np.arange(20_000, dtype=np.uint64))
    assert 0.0 <= draws.min() and draws.max() < 1.0 and len(set(draws.tolist())) == 20_000
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    chi_square = float(((counts - 400.0) ** 2 / 400.0).sum())
    assert chi_square < 94.6  # 49 degrees of freedom: exceeded by chance once in 10,000 seeds
    assert np.corrcoef(draws[:-1], draws[1:])[0, 1] == pytest.approx(0.0, abs=0.03)
