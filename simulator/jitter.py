"""How much a step's seconds differ from what the cost model says: a log-normal factor, as random as its seed.

Equal steps draw one after another, so that a run is the same every time.
"""

from __future__ import annotations

import math
import random


class Jitter:
    """deviation: of the factor's logarithm; 0: every factor is 1. The factors' mean is 1."""

    def __init__(self, deviation: float, seed: str) -> None:
        self.deviation = deviation
        self._mean = -deviation * deviation / 2
        self._random = random.Random(seed)

    def next(self) -> float:
        return math.exp(self._random.gauss(self._mean, self.deviation)) if self.deviation else 1.0
