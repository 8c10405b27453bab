"""The last minutes of the proxy's latencies and verdicts, in bins of a few seconds. Of a size that no load changes.

first_token, finished, ended ─► the open bin: counts by logarithmic bucket ─► its row, once its time is over ─► rows(), oldest first
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

BIN_S = 5.0
NUM_BINS = 120
LEAST_S = 1e-5
MOST_S = 1e5
RATIO = 1.05  # of a bucket's bounds: a percentile is right within 2.5 %


class Row(NamedTuple):
    """One bin. Latencies in seconds; None: there was none."""

    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None
    num_in_slo: int
    num_missed: int


class _Bin:
    def __init__(self) -> None:
        self.ttft: Counter[int] = Counter()
        self.tpot: Counter[int] = Counter()
        self.num_in_slo = self.num_missed = 0

    def row(self) -> Row:
        return Row(*_percentiles(self.ttft), *_percentiles(self.tpot), self.num_in_slo, self.num_missed)


EMPTY = Row(None, None, None, None, 0, 0)


class Timeline:
    """clock: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closed: deque[Row] = deque([EMPTY] * (NUM_BINS - 1), NUM_BINS - 1)
        self._open = _Bin()
        self._number = self._now()

    def first_token(self, ttft_s: float) -> None:
        self._present().ttft[_bucket(ttft_s)] += 1

    def finished(self, tpot_s: float) -> None:
        self._present().tpot[_bucket(tpot_s)] += 1

    def ended(self, in_slo: str) -> None:
        """in_slo: as a Verdict says it; "unknown" is not counted."""
        present = self._present()
        present.num_in_slo += in_slo == "yes"
        present.num_missed += in_slo == "no"

    def rows(self) -> list[Row]:
        """NUM_BINS of them; the last one is still open."""
        present = self._present().row()
        return [*self._closed, present]

    def _present(self) -> _Bin:
        num_over = self._now() - self._number
        if num_over > 0:
            self._closed.append(self._open.row())
            self._closed.extend([EMPTY] * min(num_over - 1, NUM_BINS))
            self._open, self._number = _Bin(), self._number + num_over
        return self._open

    def _now(self) -> int:
        return math.floor(self._clock() / BIN_S)


def _bucket(value_s: float) -> int:
    return math.floor(math.log(min(max(value_s, LEAST_S), MOST_S) / LEAST_S, RATIO))


def _percentiles(counts: Counter[int]) -> tuple[float | None, float | None]:
    """p50 and p99, by nearest rank."""
    total = counts.total()
    if not total:
        return None, None
    found: list[float] = []
    reached = 0
    ranks = [math.ceil(share * total) for share in (0.5, 0.99)]
    for bucket in sorted(counts):
        reached += counts[bucket]
        while len(found) < len(ranks) and reached >= ranks[len(found)]:
            found.append(round(LEAST_S * RATIO ** (bucket + 0.5), 6))
    return found[0], found[1]
