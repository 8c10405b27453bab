"""What the decode pool has before it: prefills that will end, decodes that run, and how long such decodes last.

placed ─► arriving (at its predicted first token) ─► decode admits it ─► running since … ─► ended ─► its seconds, where it came to its end
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

from .placement import Arriving, MemberState
from .predictors.timing import StepTime

NUM_SEEN = 500  # decodes


class LoadTracker:
    """Moments are of any one clock. Who is a key of its own for every placement."""

    def __init__(self) -> None:
        self._arriving: dict[Hashable, Arriving] = {}
        self._running: dict[Hashable, float] = {}
        self._seen: deque[float] = deque(maxlen=NUM_SEEN)

    @property
    def arriving(self) -> tuple[Arriving, ...]:
        return tuple(self._arriving.values())

    @property
    def leaving(self) -> tuple[float, ...]:
        """When each running decode began."""
        return tuple(self._running.values())

    @property
    def is_idle(self) -> bool:
        return not (self._arriving or self._running)

    def placed(self, who: Hashable, first_token_s: float, num_tokens: int) -> None:
        self._arriving[who] = Arriving(first_token_s, num_tokens)

    def began(self, who: Hashable, now_s: float) -> None:
        if self._arriving.pop(who, None) is not None:
            self._running[who] = now_s

    def finished(self, who: Hashable, now_s: float) -> float | None:
        """It came to its end: how long it decoded. None for one that did not."""
        began_s = self._running.pop(who, None)
        self._arriving.pop(who, None)
        if began_s is None:
            return None
        self._seen.append(now_s - began_s)
        return now_s - began_s

    def left(self, who: Hashable) -> None:
        """It was given up, or has finished before."""
        self._arriving.pop(who, None)
        self._running.pop(who, None)

    def decode_s(self, now_s: float) -> float:
        """Of a request, on average; before one has ended, twice the age of those that run."""
        if self._seen:
            return sum(self._seen) / len(self._seen)
        ages = [now_s - began_s for began_s in self._running.values()]
        return 2.0 * sum(ages) / len(ages) if ages else 0.0

    def fits_in_s(self, step: StepTime, member: MemberState, step_s: float, limit_s: float, now_s: float) -> float:
        """When so many of member's batch will have left, at the rate at which decodes end, that its step of step_s is within limit_s."""
        if member.num_running == 0:
            return self.decode_s(now_s)
        each_s = step.per_sequence_s + step.per_kv_token_s * member.num_running_tokens / member.num_running
        num_over = math.ceil((step_s - limit_s) / each_s) if each_s > 0.0 else member.num_running
        return self.decode_s(now_s) * min(num_over / member.num_running, 1.0)
