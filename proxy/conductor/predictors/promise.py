"""How much later than predicted first tokens come, for one in ten: what may be promised.

measured / predicted of the last ones ─► by how long they stood where others could pass them (powers of two of ms) ─► the ninth of ten
A prediction is of the middle. Arrivals come in bursts, and what will pass a prompt that waits is known on the average alone.
"""

from __future__ import annotations

from collections import deque

import numpy as np

SHARE = 0.9
NUM_SEEN = 100  # of each kind
FEWEST = 12  # to go by
ALL = -1


class Promise:
    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._factors: dict[int, float] = {}  # of kinds of which enough were seen; ALL: of all

    def factor(self, exposed_s: float) -> float:
        """Of the predicted TTFT, that nine of ten first tokens come within. 1 before enough are known.

        exposed_s: predicted, from the arrival until nobody can pass it any more.
        """
        return self._factors.get(_kind(exposed_s), self._factors.get(ALL, 1.0))

    def observe(self, exposed_s: float, predicted_s: float, measured_s: float) -> None:
        for kind in (_kind(exposed_s), ALL):
            seen = self._seen.setdefault(kind, deque(maxlen=NUM_SEEN))
            seen.append(measured_s / max(predicted_s, 1e-9))
            if len(seen) >= FEWEST:
                self._factors[kind] = float(np.quantile(np.fromiter(seen, np.float64), SHARE))

    def frozen(self) -> Promise:
        found = Promise()
        found._factors = dict(self._factors)
        return found


def _kind(exposed_s: float) -> int:
    return int(max(exposed_s, 0.0) * 1e3).bit_length()
