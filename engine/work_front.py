"""How long a worker has been at one piece of work: a step, or a copy between pages and a store.

begin ─► ahead of others or behind them ─► end        the oldest that has not ended is the front; its age is told in the load reports
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ..protocol.awake_clock import AwakeClock


class Front(NamedTuple):
    number: int  # of the piece, counted from 0
    since: float  # of time.monotonic(): when it became the oldest


class WorkFront:
    """Of work that ends in the order in which it begins. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_begun = 0
        self._num_ended = 0
        self._since = 0.0

    def begin(self) -> None:
        with self._lock:
            if self._num_begun == self._num_ended:
                self._since = self._clock()
            self._num_begun += 1

    def end(self) -> None:
        with self._lock:
            self._num_ended += 1
            self._since = self._clock()

    def age_s(self) -> float:
        """Of the oldest, 0 where nothing is under way."""
        oldest = self.oldest
        return 0.0 if oldest is None else self._clock() - oldest.since

    @property
    def oldest(self) -> Front | None:
        """None: nothing is under way."""
        with self._lock:
            return Front(self._num_ended, self._since) if self._num_ended < self._num_begun else None


class WorkAge:
    """The age of a front, as one who looks at it now and again counts it: time in which the whole process was stopped is not the work's."""

    def __init__(self, front: WorkFront, interval_s: float) -> None:
        """interval_s: the usual gap between two looks."""
        self._front = front
        self._awake = AwakeClock(interval_s)
        self._number = -1
        self._age_s = 0.0

    def look(self, now: float) -> float:
        """Seconds; 0 where nothing is under way."""
        awake_s, oldest = self._awake.tick(now), self._front.oldest
        if oldest is None:
            self._number = -1
            return 0.0
        if oldest.number != self._number:
            self._number, self._age_s = oldest.number, 0.0
        self._age_s = min(self._age_s + awake_s, max(now - oldest.since, 0.0))
        return self._age_s
