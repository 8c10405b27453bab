"""The bound on requests that wait for their first token. One more than the bound is told when to come back.

enter ─► [ admitted, without a first token ] ─► leave (first token: a sample of the rate; or the request ended)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ..protocol.errors import Overloaded

RATE_WINDOW_S = 30.0
RATE_WINDOW_LEN = 256  # first tokens
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


class AdmissionQueue:
    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_requests = 0
        self.num_tokens = 0  # of their prompts
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._first_tokens: deque[float] = deque(maxlen=RATE_WINDOW_LEN)  # when, by clock

    def require_room(self, num_tokens: int) -> None:
        """Raises Overloaded. A prompt over the token bound on its own is let into an empty queue: waiting would not help it."""
        if self.num_requests >= self._max_requests:
            full = f"{self.num_requests} requests wait for their first token, {self._max_requests} may"
        elif self.num_requests and self.num_tokens + num_tokens > self._max_tokens:
            full = f"{self.num_tokens} prompt tokens wait for their prefill, {num_tokens} more are over the bound of {self._max_tokens}"
        else:
            return
        retry_after_s = self.retry_after_s()
        raise Overloaded(f"{full}; come back in {retry_after_s:.0f} s", retry_after_s=retry_after_s)

    def enter(self, num_tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += num_tokens

    def leave(self, num_tokens: int, *, first_token: bool) -> None:
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if first_token:
            self._first_tokens.append(self._clock())

    def retry_after_s(self) -> float:
        """The time in which those who wait now get their first token, at the rate of the last RATE_WINDOW_S seconds
        (Little's law: requests waiting / first tokens a second), between MIN_ and MAX_RETRY_AFTER_S. A window without a
        first token tells no rate: the maximum where there were some before it, the minimum before the very first.
        """
        if not self._first_tokens:
            return MIN_RETRY_AFTER_S
        now = self._clock()
        recent = [moment for moment in self._first_tokens if now - moment <= RATE_WINDOW_S]
        if not recent:
            return MAX_RETRY_AFTER_S
        # over a second at least: the gaps of a burst are not a rate
        rate = len(recent) / max(now - recent[0], 1.0)
        return min(max(self.num_requests / rate, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
