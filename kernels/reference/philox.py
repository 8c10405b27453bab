"""Philox4x32-10, the counter-based generator of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".

(key: 64 bits, counter: 128 bits) ─► 128 random bits, with no state between draws: draw i of a seed is drawn alone,
anywhere, in any order. Triton's tl.philox and cuRAND run the same rounds.
"""

from __future__ import annotations

import numpy as np

NUM_ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Random words uint64 [n, 4], each below 2^32, from counter words [n, 4] and key words [n, 2] of the same kind."""
    c0, c1, c2, c3 = (counters[:, word] for word in range(4))
    k0, k1 = keys[:, 0], keys[:, 1]
    for _ in range(NUM_ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> HALF) ^ c1 ^ k0, second & LOW, (first >> HALF) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniform(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One number in [0, 1) of 53 random bits for each (seed, index), float64 [n].

    seeds, indices: uint64 [n]. The seed is the key and the index the counter's low half, low words first.
    """
    zeros = np.zeros_like(indices)
    counters = np.stack((indices & LOW, indices >> HALF, zeros, zeros), axis=1)
    words = philox4x32(counters, np.stack((seeds & LOW, seeds >> HALF), axis=1))
    return ((words[:, 0] << HALF | words[:, 1]) >> np.uint64(11)) * 2.0**-53
