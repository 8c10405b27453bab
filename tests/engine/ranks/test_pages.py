"""When a rank may copy the blocks of a step that it computes itself."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from halfmoon.engine.ranks.pages import KEPT_STEPS, NO_STEP, Behind, StepProgress

HANG_S = 60.0


@pytest.fixture
def reading() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def made() -> StepProgress:
    numbers = iter(range(1000))
    return StepProgress(lambda: next(numbers))  # type: ignore[return-value]  # an event for each layer, told apart


def test_pages_that_no_step_writes_to_are_copied_at_once() -> None:
    assert made().wait(NO_STEP) is None


def test_a_copy_waits_for_its_layer_of_its_step(reading: ThreadPoolExecutor) -> None:
    progress = made()
    waiting: Any = reading.submit(progress.wait, Behind(2, 1))
    first = progress.hook(1)
    first(0)
    first(1)
    second = progress.hook(2)
    second(0)
    assert not waiting.done()
    second(1)
    assert waiting.result(HANG_S) == 3, "the event of that layer"
    assert progress.wait(Behind(1, 0)) == 0, "an earlier step's are known still"


def test_a_copy_of_a_step_that_is_long_over_waits_for_all_that_was_given_since() -> None:
    progress = made()
    for step in range(1, 2 + KEPT_STEPS):
        progress.hook(step)(0)
    assert progress.wait(Behind(2, 0)) == 1
    assert progress.wait(Behind(1, 0)) == 1 + KEPT_STEPS, "a new event"
