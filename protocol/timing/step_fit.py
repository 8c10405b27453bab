"""StepCost, learnt from steps as they were measured: with chunks, with decode tokens, with both.

measured ─► the bound that the step was at: the read of the weights, or its products ─► least squares of relative errors ─► StepCost
A hiccup counts as a few usual errors and no more. If everything is far off, that is the usual error, and is followed.

Steps that are all alike can be explained in many ways, and some of those say that a larger chunk takes far too long. Nobody would then
run one and see. So no step is predicted to take more than the last mixed one did, times what it has more of.
"""

from __future__ import annotations

import math

from .regression import RelativeFit
from .step_cost import StepCost, StepWork

KI = 1024.0
MILLI = 1e-3  # milliseconds inside
UNITS = (1.0, 1.0, KI, KI * KI, 10.0, 100 * KI)  # of the weights' features, so that they are of one size
ABOVE_READ = 1.5  # times the read: what took longer was at its products' bound, whatever had been thought
FORGETTING = 0.995  # the last two hundred steps: some seconds
LEAST_ERROR = 0.03  # relative: measurements of equal steps differ by as much
FIRST_ERROR = 1.0
ERROR_WINDOW = 0.02  # weight of the newest error in their mean
HICCUP = 3.0  # usual errors that one step may teach
LEAST_SHARE = 0.1  # of what was measured, that a prediction counts as at least


class StepFit:
    """prior: where to begin; a calibration, a profile."""

    def __init__(self, prior: StepCost) -> None:
        self._fit = RelativeFit([weight * unit / MILLI for weight, unit in zip(prior, UNITS, strict=True)], forgetting=FORGETTING)
        self._usual_error = FIRST_ERROR
        self.num_observations = 0
        self.cost = prior
        self._last_mixed: tuple[StepWork, float] | None = None  # chunks beside decode tokens, and what they took

    def seconds(self, work: StepWork) -> float:
        """Predicted."""
        return min(self.cost.seconds(work), self._most_s(work))

    def observe(self, work: StepWork, measured_s: float) -> None:
        """A step that took no time, or computed nothing, teaches nothing."""
        if measured_s <= 0.0 or not (work.num_chunk_tokens or work.num_decodes):
            return
        if work.num_chunk_tokens and work.num_decodes:
            self._last_mixed = work, measured_s
        features = self._features(work, measured_s)
        # a prediction near 0 or below it would keep itself alive: what may be learnt is in proportion to it
        predicted_s = max(self._fit.predict(features) * MILLI, LEAST_SHARE * measured_s)
        error = measured_s / predicted_s - 1.0
        most = HICCUP * max(self._usual_error, LEAST_ERROR)
        clipped = min(max(error, -most), most)
        self._fit.observe(features, max(1.0 + clipped, 0.1) * predicted_s / MILLI)
        self.num_observations += 1
        weight = max(ERROR_WINDOW, 1.0 / (self.num_observations + 1))
        self._usual_error += weight * (min(abs(error), 2 * most) - self._usual_error)
        self.cost = self._as_cost()

    def _most_s(self, work: StepWork) -> float:
        """A part of a step is there once, however much it computes; the others grow in proportion at most."""
        if self._last_mixed is None:
            return math.inf
        last, measured_s = self._last_mixed
        return measured_s * max(1.0, *(_ratio(more, less) for more, less in zip(work, last, strict=True)))

    def _features(self, work: StepWork, measured_s: float) -> tuple[float, ...]:
        num_tokens, attention, num_decodes, num_context_tokens = work
        cost = self.cost
        at_products = False
        if num_tokens:
            rest_s = cost.seconds(work._replace(num_chunk_tokens=0)) - cost.read_s
            products_s = cost.chunk_s + num_tokens * cost.per_token_s
            at_products = products_s > cost.read_s or measured_s - rest_s > ABOVE_READ * cost.read_s
        bound = (0.0, 1.0, float(num_tokens)) if at_products else (1.0, 0.0, 0.0)
        values = (*bound, attention, float(num_decodes), float(num_context_tokens))
        return tuple(value / unit for value, unit in zip(values, UNITS, strict=True))

    def _as_cost(self) -> StepCost:
        """No token takes less than no time, nor the weights' read."""
        read, chunk, *per = (weight * MILLI / unit for weight, unit in zip(self._fit.weights, UNITS, strict=True))
        return StepCost(max(read, 0.0), chunk, *(max(weight, 0.0) for weight in per))


def _ratio(more: float, less: float) -> float:
    return more / less if less > 0.0 else (math.inf if more > 0.0 else 0.0)
