"""A virtual clock and what happens on it: a heap of moments. Equal moments keep the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventLoop:
    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, moment: float, call: Callable[..., None], *args: Any) -> None:
        """Raises ValueError for a moment that has passed."""
        if moment < self.now:
            raise ValueError(f"the clock stands at {self.now}; nothing can happen at {moment} any more")
        self.num_events += 1
        heapq.heappush(self._heap, (moment, self.num_events, call, args))

    def step(self) -> bool:
        """Runs what comes next. False where nothing does."""
        if not self._heap:
            return False
        self.now, _, call, args = heapq.heappop(self._heap)
        call(*args)
        return True

    def run(self) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now, _, call, args = pop(heap)
            call(*args)
