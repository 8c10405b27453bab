"""The queue's bounds, and its estimate of when to come back, on a clock of the test's own."""

from __future__ import annotations

import pytest

from halfmoon.protocol.errors import Overloaded
from halfmoon.proxy.admission_queue import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, AdmissionQueue


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def serve(queue: AdmissionQueue, clock: Clock, num_requests: int, gap_s: float) -> None:
    for _ in range(num_requests):
        clock.now += gap_s
        queue.enter(1)
        queue.leave(1, first_token=True)


def test_the_bound_is_the_last_request_that_is_let_in() -> None:
    queue = AdmissionQueue(max_requests=3, max_tokens=100)
    for _ in range(3):
        queue.require_room(10)
        queue.enter(10)
    with pytest.raises(Overloaded, match="3 requests wait"):
        queue.require_room(10)
    queue.leave(10, first_token=False)
    queue.require_room(80)
    with pytest.raises(Overloaded, match="20 prompt tokens wait"):
        queue.require_room(81)


@pytest.mark.parametrize("gap_s", [0.1, 0.5, 2.0])
def test_retry_after_is_the_waiting_requests_over_the_rate_of_first_tokens(gap_s: float) -> None:
    clock = Clock()
    queue = AdmissionQueue(1000, 10**6, clock)
    serve(queue, clock, 200, gap_s)
    for _ in range(20):
        queue.enter(1)
    assert queue.retry_after_s() == pytest.approx(20 * gap_s, rel=0.1)


def test_an_old_rate_is_no_rate() -> None:
    clock = Clock()
    queue = AdmissionQueue(1000, 10**6, clock)
    queue.enter(1)
    assert queue.retry_after_s() == MIN_RETRY_AFTER_S
    serve(queue, clock, 5, 0.1)
    clock.now += 10
    assert queue.retry_after_s() == pytest.approx(1 / (5 / 10.4), rel=0.01), "a stall lowers the rate at once"
    clock.now += 3600
    assert queue.retry_after_s() == MAX_RETRY_AFTER_S


def test_a_burst_is_not_a_rate_and_the_answer_is_bounded() -> None:
    clock = Clock()
    queue = AdmissionQueue(10**6, 10**9, clock)
    serve(queue, clock, 2, 0.0001)
    for _ in range(10):
        queue.enter(1)
    assert queue.retry_after_s() == pytest.approx(5)
    for _ in range(10_000):
        queue.enter(1)
    assert queue.retry_after_s() == MAX_RETRY_AFTER_S
