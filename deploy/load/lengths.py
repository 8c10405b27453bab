"""Lengths of prompts and answers: "512", "uniform:100:900", "lognormal:800:1.2"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError

FORMS = "N, fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"


@dataclass(frozen=True, slots=True)
class Lengths:
    kind: str  # fixed, uniform, lognormal
    first: float  # the length, the lowest, the median
    second: float = 0.0  # the highest (inclusive), the deviation of the logarithm

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises ConfigError for any other form, and for lengths below 1."""
        kind, *numbers = text.split(":") if ":" in text else ["fixed", text]
        try:
            values = [float(number) for number in numbers]
        except ValueError as error:
            raise ConfigError(f"{text!r} is no length; write {FORMS}") from error
        if (kind, len(values)) not in (("fixed", 1), ("uniform", 2), ("lognormal", 2)) or not all(map(math.isfinite, values)):
            raise ConfigError(f"{text!r} is no length; write {FORMS}")
        if values[0] < 1 or (kind == "uniform" and values[1] < values[0]) or (kind == "lognormal" and values[1] < 0):
            raise ConfigError(f"{text!r} has lengths below 1, or its second number is too small; write {FORMS}")
        return cls(kind, *values)

    def draw(self, num: int, rng: np.random.Generator, most: int) -> NDArray[np.int64]:
        """[num] lengths from 1 to most."""
        if self.kind == "fixed":
            values = np.full(num, self.first)
        elif self.kind == "uniform":
            values = rng.integers(int(self.first), int(self.second) + 1, num).astype(np.float64)
        else:
            values = rng.lognormal(math.log(self.first), self.second, num)
        return np.clip(np.rint(values), 1, most).astype(np.int64)
