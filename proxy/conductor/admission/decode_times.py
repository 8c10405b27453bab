"""How long requests decode, from those that have ended: on average, by length of the prompt, and how likely one is to go on.

ended (seconds, tokens) ─► the last 500 ─► mean, median, chance to last so much longer at an age
                        └► by power of two of the prompt's length ─► mean of that length, near the mean of all while few were seen
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ..pool import Floats

DECODE_S = 15.0  # before requests have ended
NUM_SEEN = 500  # remembered
NUM_ENOUGH = 20  # to go by
NUM_DOUBTED = 10  # of a length, that count as much as all others together
NUM_OF_A_LENGTH = 200  # about so many are remembered of each


@dataclass(slots=True)
class DecodeTimes:
    first_s: float = DECODE_S
    _seen: deque[float] = field(default_factory=deque[float])
    _sorted: list[float] = field(default_factory=list[float])
    _total_s: float = 0.0
    _of_length: dict[int, tuple[int, float]] = field(default_factory=dict[int, tuple[int, float]])  # power of two -> number seen, mean

    def observe(self, seconds: float, num_tokens: int) -> None:
        """A request with a prompt of num_tokens has decoded for so long; 0: its prompt is not known."""
        if len(self._seen) == NUM_SEEN:
            oldest_s = self._seen.popleft()
            del self._sorted[bisect_left(self._sorted, oldest_s)]
            self._total_s -= oldest_s
        self._seen.append(seconds)
        insort(self._sorted, seconds)
        self._total_s += seconds
        if num_tokens > 0:
            num, mean_s = self._of_length.get(num_tokens.bit_length(), (0, 0.0))
            num += 1
            self._of_length[num_tokens.bit_length()] = num, mean_s + (seconds - mean_s) / min(num, NUM_OF_A_LENGTH)

    @property
    def known(self) -> bool:
        """Enough have been seen to go by."""
        return len(self._seen) >= NUM_ENOUGH

    @property
    def median_s(self) -> float:
        return self._sorted[len(self._sorted) // 2] if self._sorted else self.first_s

    @property
    def mean_s(self) -> float:
        return self._total_s / len(self._seen) if self.known else self.median_s

    def expected_s(self, num_tokens: int) -> float:
        """Of a request with a prompt of num_tokens."""
        num, mean_s = self._of_length.get(num_tokens.bit_length(), (0, 0.0))
        return (num * mean_s + NUM_DOUBTED * self.mean_s) / (num + NUM_DOUBTED)

    def lasting(self, age_s: float | Floats, more_s: float | Floats) -> Floats:
        """Chances that requests which have decoded for age_s will do so for more_s longer; the shape is that of the longer of the two."""
        then_s = np.asarray(age_s + more_s)
        if not self.known:
            return np.where(then_s < self.median_s, 1.0, 0.0)
        num, ordered = len(self._sorted), np.array(self._sorted)
        num_older = np.asarray(num - np.searchsorted(ordered, age_s, side="right"))
        num_lasting = num - np.searchsorted(ordered, then_s, side="right")
        return np.where(num_older == 0, 0.5, num_lasting / np.maximum(num_older, 1))  # 0.5: older than any that was seen
