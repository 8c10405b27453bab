"""How long a worker has been at one piece of work, as it is told to the proxy."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from halfmoon.engine.transfer import TransferThread
from halfmoon.engine.work_front import WorkAge, WorkFront


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def age_after(age: WorkAge, clock: Clock, *gaps_s: float) -> float:
    """Looked at after each gap; the last look's answer."""
    found = 0.0
    for gap_s in gaps_s:
        clock.now += gap_s
        found = age.look(clock.now)
    return found


def test_a_piece_is_as_old_as_it_is_under_way_and_idleness_has_no_age(clock: Clock) -> None:
    front = WorkFront(clock)
    age = WorkAge(front, 0.25)
    assert age_after(age, clock, 0.2, 0.2) == 0.0
    front.begin()
    assert age_after(age, clock, *[0.2] * 10) == pytest.approx(2.0)
    front.end()
    assert age_after(age, clock, 0.2) == 0.0


def test_what_waits_behind_the_front_counts_from_the_front_s_end(clock: Clock) -> None:
    front = WorkFront(clock)
    age = WorkAge(front, 0.25)
    front.begin()
    front.begin()
    assert age_after(age, clock, *[0.2] * 10) == pytest.approx(1.8), "counted from the first look on"
    front.end()
    clock.now += 0.1
    assert age.look(clock.now) == pytest.approx(0.1)


def test_many_short_pieces_are_never_old(clock: Clock) -> None:
    front = WorkFront(clock)
    age = WorkAge(front, 0.25)
    for _ in range(100):
        front.begin()
        assert age_after(age, clock, 0.2) < 0.3
        front.end()


def test_a_process_that_was_stopped_does_not_blame_its_step(clock: Clock) -> None:
    front = WorkFront(clock)
    age = WorkAge(front, 0.2)
    age.look(clock.now)
    front.begin()
    assert age_after(age, clock, 0.2, 30.0) == pytest.approx(0.6)


def test_a_copy_that_hangs_is_the_front_of_a_transfer_thread(crashes: list[Any]) -> None:
    transfer = TransferThread("transfer", torch.device("cpu"), crashes.append)
    assert transfer.front.oldest is None
    go = threading.Event()

    def hang() -> None:
        go.wait(60.0)

    transfer.submit(hang)
    last = transfer.start(lambda: None)
    assert transfer.front.oldest is not None and transfer.front.oldest.number == 0
    go.set()
    last.result(60)
    transfer.close()
    assert transfer.front.oldest is None and not crashes


def test_a_copy_that_fails_is_over_too(crashes: list[Any]) -> None:
    transfer = TransferThread("transfer", torch.device("cpu"), crashes.append)
    transfer.submit(broken)
    transfer.close()
    assert transfer.front.oldest is None and len(crashes) == 1


def broken() -> None:
    raise RuntimeError("the copy failed")


@pytest.fixture
def crashes() -> list[Any]:
    return []
