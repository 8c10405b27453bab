"""Recursive least squares: a linear model that follows what it sees, one observation at a time.

weights · features ≈ target;     old observations fade by `forgetting` with every new one
"""

from __future__ import annotations

from collections.abc import Sequence

FORGETTING = 0.999  # the last thousand
NOISE = 0.05  # of one measurement, relative
DOUBT = 1.0  # of a profile's weight, relative
TRIFLE = 0.02  # of its largest weight: what a weight that the profile has at 0 may be


class RecursiveLeastSquares:
    """After Plackett 1950, in Ljung's form (System Identification, 2nd ed., eq. 11.16). No numpy: four features are forty products.

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
        size = len(self.weights)
        self._covariance = [[(variances[row] if row == column else 0.0) for column in range(size)] for row in range(size)]
        self._variances = list(variances)  # forgetting may not blow the covariance over them, where inputs stay the same

    def predict(self, features: Sequence[float]) -> float:
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    def observe(self, features: Sequence[float], target: float) -> float:
        """Returns the error of the prediction before it learnt: target - prediction."""
        error = target - self.predict(features)
        along = [sum(entry * feature for entry, feature in zip(row, features, strict=True)) for row in self._covariance]
        scale = self._forgetting + sum(feature * entry for feature, entry in zip(features, along, strict=True))
        gain = [entry / scale for entry in along]
        self.weights = [weight + step * error for weight, step in zip(self.weights, gain, strict=True)]
        known = all(row[at] <= self._variances[at] for at, row in enumerate(self._covariance))
        fade = self._forgetting if known else 1.0
        for row, step in zip(self._covariance, gain, strict=True):
            for column, entry in enumerate(along):
                row[column] = (row[column] - step * entry) / fade
        self.num_observations += 1
        return error


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
