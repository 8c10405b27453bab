"""Which measurements a fit learns from: the hiccup of one machine must not become everybody's prediction.

near the prediction ─► learnt          far off ─► kept aside; learnt once some of the last ones were as far off: then it is the prediction
A process's first prefill (compilation, cold caches) is one of a kind, and so is a second in which something else had the cores.
"""

from __future__ import annotations

import statistics
from collections import deque

FAR = 4.0  # times the prediction, or a part of it
ALIKE = 2.0  # times each other
MOST = 1e4  # times; no machine is that much slower, the prediction was of nothing
NUM_ASIDE = 8
NUM_ALIKE = 3  # that outvote the prediction; an outlier among the first ones is outvoted by those that follow


class OutlierFilter:
    def __init__(self) -> None:
        self.level = 1.0  # median measured / predicted of those that agree, where the last one passed for their sake; else 1
        self._aside: deque[float] = deque(maxlen=NUM_ASIDE)  # measured / predicted of the last that were far off

    def admits(self, predicted_s: float, measured_s: float) -> bool:
        """To be asked once for every measurement, in order."""
        self.level = 1.0
        if measured_s <= 0.0:
            return False  # no clock resolves it
        ratio = measured_s / max(predicted_s, 1e-9)
        if 1.0 / FAR <= ratio <= FAR:
            return True
        self._aside.append(ratio)
        alike = [other for other in self._aside if 1.0 / ALIKE <= other / ratio <= ALIKE]
        if len(alike) < NUM_ALIKE:
            return False
        level = statistics.median(alike)
        if 1.0 / MOST <= level <= MOST:
            self.level = level
        return True
