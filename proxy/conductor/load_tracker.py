"""What the decode pool has before it: prefills that will end, decodes that run, and how long such decodes last.

placed ─► arriving (at its predicted first token) ─► decode admits it ─► running since … ─► ended ─► its seconds, where it came to its end
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

import numpy as np

from .member_state import MemberState
from .placement import Arrivals
from .pool import Floats
from .predictors.timing import StepTime
from .rows import Rows

NUM_SEEN = 500  # decodes


class LoadTracker:
    """Moments are of any one clock. Who is a key of its own for every placement."""

    def __init__(self) -> None:
        self._arriving: Rows[Hashable] = Rows(np.float64, np.int64)  # first token at, tokens
        self._running: Rows[Hashable] = Rows(np.float64)  # since
        self._seen: deque[float] = deque(maxlen=NUM_SEEN)

    @property
    def arriving(self) -> Arrivals:
        """A view, valid until the next change."""
        return Arrivals(*self._arriving.columns())

    @property
    def began_s(self) -> Floats:
        """When each running decode began. A view, valid until the next change."""
        return self._running.columns()[0]

    @property
    def is_idle(self) -> bool:
        return not (len(self._arriving) or len(self._running))

    def placed(self, who: Hashable, first_token_s: float, num_tokens: int) -> None:
        self._arriving.put(who, first_token_s, num_tokens)

    def began(self, who: Hashable, now_s: float) -> None:
        if self._arriving.remove(who):
            self._running.put(who, now_s)

    def finished(self, who: Hashable, now_s: float) -> float | None:
        """It came to its end: how long it decoded. None for one that did not."""
        began_s = self._running.get(who, 0) if who in self._running else None
        self.left(who)
        if began_s is None:
            return None
        self._seen.append(now_s - began_s)
        return now_s - began_s

    def left(self, who: Hashable) -> None:
        """It was given up, or has finished before."""
        self._arriving.remove(who)
        self._running.remove(who)

    def decode_s(self, now_s: float) -> float:
        """Of a request, on average; before one has ended, twice the age of those that run."""
        if self._seen:
            return sum(self._seen) / len(self._seen)
        return 2.0 * float((now_s - self.began_s).mean()) if len(self._running) else 0.0

    def fits_in_s(self, step: StepTime, member: MemberState, step_s: float, limit_s: float, now_s: float) -> float:
        """When so many of member's batch will have left, at the rate at which decodes end, that its step of step_s is within limit_s."""
        if member.num_running == 0:
            return self.decode_s(now_s)
        each_s = step.per_sequence_s + step.per_kv_token_s * member.num_running_tokens / member.num_running
        num_over = math.ceil((step_s - limit_s) / each_s) if each_s > 0.0 else member.num_running
        return self.decode_s(now_s) * min(num_over / member.num_running, 1.0)
