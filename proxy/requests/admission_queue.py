"""Bounds how many requests may wait for their first token. A request over the bound is refused, with a time to come back.

enter ─► [ admitted, without a first token ] ─► leave (first token: a sample of the rate; or the request ended)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.errors import Overloaded
from ..conductor.placement import come_back

RATE_WINDOW_S = 30.0
RATE_WINDOW_LEN = 256  # first tokens
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    num_tokens: int  # of its prompt
    first_token_s: float | None  # predicted, on the queue's clock


class AdmissionQueue:
    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_tokens = 0  # of the prompts of those that wait
        self._waiting: set[Waiting] = set()
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._first_tokens: deque[float] = deque(maxlen=RATE_WINDOW_LEN)  # when, by clock

    @property
    def num_requests(self) -> int:
        return len(self._waiting)

    def require_room(self, num_requests: int, num_tokens: int) -> None:
        """Raises Overloaded unless there is room for all of num_requests, which have num_tokens prompt tokens together.

        A prompt that is over the token bound by itself may enter an empty queue, because waiting would not help it.
        """
        num_free = self._max_requests - self.num_requests
        if num_free <= 0:
            full = f"{self.num_requests} requests wait for their first token, {self._max_requests} may"
        elif num_requests > num_free:
            full = (
                f"the request has {num_requests} choices and there is room for {num_free}: {self.num_requests} requests wait for their "
                f"first token, {self._max_requests} may; ask for fewer choices"
            )
        elif self._waiting and self.num_tokens + num_tokens > self._max_tokens:
            full = f"{self.num_tokens} prompt tokens wait for their prefill, {num_tokens} more are over the bound of {self._max_tokens}"
        else:
            return
        retry_after_s = self.retry_after_s(num_requests, num_tokens)
        raise Overloaded(f"{full}; {come_back(retry_after_s)}", retry_after_s=retry_after_s)

    def enter(self, num_tokens: int, first_token_s: float | None = None) -> Waiting:
        """first_token_s: the predicted time of its first token, on the clock. None: not known."""
        waiting = Waiting(num_tokens, first_token_s)
        self._waiting.add(waiting)
        self.num_tokens += num_tokens
        return waiting

    def leave(self, waiting: Waiting, *, first_token: bool) -> None:
        self._waiting.remove(waiting)
        self.num_tokens -= waiting.num_tokens
        if first_token:
            self._first_tokens.append(self._clock())

    def retry_after_s(self, num_requests: int = 1, num_tokens: int = 0) -> float:
        """Seconds until there is room for so much, at most MAX_RETRY_AFTER_S.

        Taken from the first tokens predicted for the waiting requests, or else from the rate of recent first tokens.
        """
        predicted_s = self._predicted_room_s(num_requests, num_tokens)
        return self._rated_room_s() if predicted_s is None else min(predicted_s, MAX_RETRY_AFTER_S)

    def _predicted_room_s(self, num_requests: int, num_tokens: int) -> float | None:
        """None if a prediction is missing or has passed, or if the request would not even fit into an empty queue."""
        expected: list[tuple[float, int]] = []
        for waiting in self._waiting:
            if waiting.first_token_s is None:
                return None
            expected.append((waiting.first_token_s, waiting.num_tokens))
        left_requests, left_tokens = self.num_requests, self.num_tokens
        for moment, freed_tokens in sorted(expected):
            left_requests -= 1
            left_tokens -= freed_tokens
            fits = left_requests + num_requests <= self._max_requests
            if fits and (left_requests == 0 or left_tokens + num_tokens <= self._max_tokens):
                room_s = moment - self._clock()
                return room_s if room_s > 0.0 else None
        return None

    def _rated_room_s(self) -> float:
        """Seconds until the waiting requests have their first token, at the rate of the last RATE_WINDOW_S seconds.

        That is Little's law: requests waiting / first tokens a second, bounded by MIN_RETRY_AFTER_S and MAX_RETRY_AFTER_S. A window
        without a first token has no rate. It gives the maximum, or the minimum before the very first token.
        """
        if not self._first_tokens:
            return MIN_RETRY_AFTER_S
        now = self._clock()
        recent = [moment for moment in self._first_tokens if now - moment <= RATE_WINDOW_S]
        if not recent:
            return MAX_RETRY_AFTER_S
        # over at least a second: the gaps within a burst are not a rate
        rate = len(recent) / max(now - recent[0], 1.0)
        return min(max(self.num_requests / rate, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
