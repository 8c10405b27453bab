"""Recursive least squares: a linear model that follows what it sees, one observation at a time.

weights · features ≈ target;     old observations fade by `forgetting` with every new one

What fades gives way to what is believed now, with the doubt that was there at first. So inputs that never change, and those never seen,
leave the model as it is, however long that lasts; and what was seen is forgotten, whatever was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

FORGETTING = 0.999  # the last thousand
NOISE = 0.05  # of one measurement, relative
DOUBT = 1.0  # of a profile's weight, relative
TRIFLE = 0.02  # of its largest weight: what a weight that the profile has at 0 may be


class RecursiveLeastSquares:
    """Regularised, after Gunnarsson 1996 (Combining tracking and regularization in recursive least squares identification).

    It keeps the information, a sum of squares, and no covariance: differences of those lose their sign to rounding after some thousand
    observations, and the weights then grow without end. No numpy: six features are some hundred products.

    Args:
        weights: where to begin (a profile); they hold until observations say otherwise.
        variances: how far each may be off, squared, in terms of the noise of one observation. A small one holds its weight.
        forgetting: in (0, 1]; 0.999 remembers the last thousand.
    """

    def __init__(self, weights: Sequence[float], variances: Sequence[float], *, forgetting: float = FORGETTING) -> None:
        if not 0.0 < forgetting <= 1.0 or min(variances) <= 0.0:
            raise ValueError(f"forgetting is {forgetting}, variances {variances}; forgetting must be in (0, 1], variances above 0")
        self.weights = list(weights)
        self.num_observations = 0
        self._forgetting = forgetting
        self._least = [1.0 / variance for variance in variances]  # information that never fades
        self._information = [[0.0] * row + [least] for row, least in enumerate(self._least)]  # the lower triangle

    def predict(self, features: Sequence[float]) -> float:
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    def observe(self, features: Sequence[float], target: float) -> float:
        """Returns the error of the prediction before it learnt: target - prediction."""
        error = target - self.predict(features)
        for at, (row, feature, least) in enumerate(zip(self._information, features, self._least, strict=True)):
            for column in range(at + 1):
                row[column] = row[column] * self._forgetting + feature * features[column]
            row[at] += (1.0 - self._forgetting) * least
        gain = _solved(self._information, features, self._least)
        self.weights = [weight + step * error for weight, step in zip(self.weights, gain, strict=True)]
        self.num_observations += 1
        return error


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Over the shorter one's length."""
    return sum(map(mul, left, right))


def _solved(matrix: Sequence[Sequence[float]], right: Sequence[float], least: Sequence[float]) -> list[float]:
    """matrix · x = right, by Cholesky's factors.

    Args:
        matrix: the lower triangle; symmetric, and above the diagonal matrix of `least`.
    """
    factor: list[list[float]] = []
    found: list[float] = []
    for at, (row, target) in enumerate(zip(matrix, right, strict=True)):
        new: list[float] = []
        for column in range(at):
            known = factor[column]
            new.append((row[column] - _dot(new, known)) / known[column])
        # exact arithmetic has no pivot under `least`
        pivot = math.sqrt(max(row[at] - _dot(new, new), least[at]))
        found.append((target - _dot(new, found)) / pivot)
        new.append(pivot)
        factor.append(new)
    for at in reversed(range(len(found))):
        rest = sum(factor[below][at] * found[below] for below in range(at + 1, len(found)))
        found[at] = (found[at] - rest) / factor[at][at]
    return found


class RelativeFit:
    """Least squares of relative errors: a short prefill counts as much as a long one. A profile's weights are its beginning."""

    def __init__(self, weights: Sequence[float], *, forgetting: float = FORGETTING) -> None:
        least = max(TRIFLE * max(abs(weight) for weight in weights), 1e-6)
        variances = [(DOUBT * max(abs(weight), least) / NOISE) ** 2 for weight in weights]
        self._fit = RecursiveLeastSquares(weights, variances, forgetting=forgetting)

    @property
    def weights(self) -> list[float]:
        return self._fit.weights

    def predict(self, features: Sequence[float]) -> float:
        return self._fit.predict(features)

    def observe(self, features: Sequence[float], measured: float) -> float:
        """Returns measured - predicted, as it was before."""
        unit = max(measured, 1e-6)
        return self._fit.observe([feature / unit for feature in features], measured / unit) * unit
