"""What will pass a prompt that waits: later arrivals with a sooner place in the queue, as those of late were.

each arrival ─► the last 160: seconds of work, how long it lets others pass
a prompt that waits ─► for each of them: the part of the wait in which such a one, arriving, would pass ─► seconds, tokens
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..pool import Floats

NUM_SEEN = 160
OLDEST_S = 30.0
FEWEST = 12  # arrivals that say something


class Coming(NamedTuple):
    seconds: float  # of what passes the prompt
    num_tokens: float  # the same
    num_behind_tokens: float  # of what comes and does not

    def at_most(self, seconds: float) -> Coming:
        """The rest of what would pass the prompt does not."""
        if self.seconds <= seconds:
            return self
        num_tokens = self.num_tokens * seconds / self.seconds
        return Coming(seconds, num_tokens, self.num_behind_tokens + self.num_tokens - num_tokens)


class Passing:
    """Moments are of one clock."""

    def __init__(self) -> None:
        self._seen: Floats = np.zeros((0, 4))  # at, seconds, tokens, how long it lets others pass
        self._work_s = self._num_tokens = 0.0  # of all of them

    def observe(self, at_s: float, work_s: float, num_tokens: float, lets_pass_s: float) -> None:
        """A prompt was placed. lets_pass_s: from now, until the moment that its place in the queue stands for."""
        recent = self._seen[-NUM_SEEN + 1 :]
        recent = recent[np.searchsorted(recent[:, 0], at_s - OLDEST_S) :]
        self._seen = np.vstack((recent, (at_s, work_s, num_tokens, lets_pass_s)))
        self._work_s, self._num_tokens = float(self._seen[:, 1].sum()), float(self._seen[:, 2].sum())

    def within(self, wait_s: float, lets_pass_s: float, now_s: float, num_workers: int) -> Coming:
        """On a worker, in the next wait_s."""
        seen = self._seen
        if len(seen) < FEWEST:
            return Coming(0.0, 0.0, 0.0)
        span_s = max(now_s - float(seen[0, 0]), 1e-3)
        busy = min(self._work_s / span_s / num_workers, 1.0)
        here = busy ** (num_workers - 1) / num_workers / span_s  # who comes goes to a worker that has nothing to do, if there is one
        # how many like each will pass
        times = np.clip(lets_pass_s - seen[:, 3], 0.0, wait_s) * here if lets_pass_s > -np.inf else np.zeros(len(seen))
        num_tokens = float(times @ seen[:, 2])
        return Coming(float(times @ seen[:, 1]), num_tokens, wait_s * here * self._num_tokens - num_tokens)

    @property
    def mean_s(self) -> float:
        """Of the work of one that came."""
        return self._work_s / max(len(self._seen), 1)

    def frozen(self) -> Passing:
        """As it is now; what is observed later replaces the rows and does not change them."""
        found = Passing()
        found._seen, found._work_s, found._num_tokens = self._seen, self._work_s, self._num_tokens
        return found
