"""The cores that instances on one machine compute on together: where more are busy than there are cores, all of them slow down.

k busy instances on c cores ──► a step under way goes on max(1, k / c) times as slowly, from the moment at which k changes
"""

from __future__ import annotations

from typing import Protocol


class Computing(Protocol):
    def stretch(self, factor: float) -> None:
        """The rest of the step under way takes factor times as long."""
        ...


class Processor:
    """num_cores: instances that compute at full speed at once (a measured number, so not a whole one); 0: any number of them."""

    def __init__(self, num_cores: float = 0.0) -> None:
        self.num_cores = num_cores
        self._busy: dict[Computing, None] = {}  # in the order in which they came: runs are to be the same every time

    @property
    def slowdown(self) -> float:
        return slowdown(len(self._busy), self.num_cores)

    def enter(self, instance: Computing) -> None:
        """It computes from now on. Idempotent."""
        if instance not in self._busy:
            others, before = list(self._busy), self.slowdown
            self._busy[instance] = None
            self._stretch(others, before)

    def leave(self, instance: Computing) -> None:
        """It has nothing to do. Idempotent."""
        if instance in self._busy:
            before = self.slowdown
            del self._busy[instance]
            self._stretch(list(self._busy), before)

    def _stretch(self, others: list[Computing], before: float) -> None:
        after = self.slowdown
        if after != before:
            for other in others:
                other.stretch(after / before)


def slowdown(num_busy: int, num_cores: float) -> float:
    """How much longer each of num_busy instances takes because they share num_cores; 1 if num_cores is 0."""
    return max(1.0, num_busy / num_cores) if num_cores > 0 else 1.0
