"""The queue's bounds, and its estimate of when to come back, on a clock of the test's own."""

from __future__ import annotations

import pytest

from halfmoon.protocol.errors import Overloaded
from halfmoon.proxy.requests.admission_queue import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, AdmissionQueue


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def serve(queue: AdmissionQueue, clock: Clock, num_requests: int, gap_s: float) -> None:
    for _ in range(num_requests):
        clock.now += gap_s
        queue.leave(queue.enter(1), first_token=True)


def test_the_bound_is_the_last_request_that_is_let_in() -> None:
    queue = AdmissionQueue(max_requests=3, max_tokens=100)
    waiting = []
    for _ in range(3):
        queue.require_room(1, 10)
        waiting.append(queue.enter(10))
    with pytest.raises(Overloaded, match="3 requests wait"):
        queue.require_room(1, 10)
    queue.leave(waiting.pop(), first_token=False)
    queue.require_room(1, 80)
    with pytest.raises(Overloaded, match="20 prompt tokens wait"):
        queue.require_room(1, 81)


def test_several_have_room_together_or_not_at_all() -> None:
    queue = AdmissionQueue(max_requests=3, max_tokens=100)
    queue.require_room(3, 1000)  # over the token bound, but nobody is before them
    queue.enter(40)
    queue.require_room(2, 60)
    with pytest.raises(Overloaded, match="3 choices and there is room for 2"):
        queue.require_room(3, 30)
    with pytest.raises(Overloaded, match="40 prompt tokens wait"):
        queue.require_room(2, 61)


def test_predicted_first_tokens_tell_when_there_is_room() -> None:
    clock = Clock()
    queue = AdmissionQueue(max_requests=3, max_tokens=100, clock=clock)
    for num_tokens, in_s in ((50, 8.0), (10, 2.0), (30, 5.5)):
        queue.enter(num_tokens, clock.now + in_s)
    assert queue.retry_after_s(1, 10) == pytest.approx(2.0), "one place, with the first token that comes"
    assert queue.retry_after_s(2, 10) == pytest.approx(5.5)
    assert queue.retry_after_s(1, 45) == pytest.approx(5.5), "50 + 45 tokens fit behind the second"
    assert queue.retry_after_s(1, 60) == pytest.approx(8.0)
    assert queue.retry_after_s(1, 500) == pytest.approx(8.0), "into the empty queue"
    with pytest.raises(Overloaded, match=r"come back in 2\.0 s") as caught:
        queue.require_room(1, 1)
    assert caught.value.retry_after_s == pytest.approx(2.0)


def test_a_prediction_that_has_passed_or_is_missing_leaves_it_to_the_rate() -> None:
    clock = Clock()
    queue = AdmissionQueue(max_requests=2, max_tokens=100, clock=clock)
    serve(queue, clock, 5, 2.0)
    queue.enter(1, clock.now + 0.5)
    queue.enter(1, clock.now + 9.0)
    assert queue.retry_after_s() == pytest.approx(0.5)
    clock.now += 0.6
    assert queue.retry_after_s() == pytest.approx(2 / (5 / 8.6), rel=0.01)
    unknown = AdmissionQueue(max_requests=1, max_tokens=100, clock=clock)
    unknown.enter(1)
    assert unknown.retry_after_s() == MIN_RETRY_AFTER_S


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
