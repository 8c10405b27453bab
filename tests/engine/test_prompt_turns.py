"""Turns in the schedulers of both halves: who is computed, who starts, and what late prompts leave to others."""

from __future__ import annotations

from typing import Any

import pytest

from halfmoon.decode_worker.scheduler import DecodeScheduler
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prompt_turns import AGAIN_S
from halfmoon.engine.sequence import Sequence
from halfmoon.prefill_worker.scheduler import PrefillScheduler
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.timing.step_cost import ChunkWork
from halfmoon.protocol.timing.turns import LONG_S, LONG_STEPS

BLOCK, BUDGET = 4, 16
TOKEN_S = 0.1


def left_s(work: ChunkWork) -> float:
    return TOKEN_S * work.num_left_tokens


class Queue:
    """Either scheduler, with prompts whose pages have nothing to load."""

    def __init__(self, half: str, num_pages: int = 64) -> None:
        allocator = PageAllocator(num_pages)
        self.is_prefill = half == "prefill"
        self.scheduler: Any = (
            PrefillScheduler(allocator, BLOCK, BUDGET)
            if self.is_prefill
            else DecodeScheduler(allocator, BLOCK, eos_token_ids=frozenset(), max_running=8, max_prefill_tokens_per_step=BUDGET)
        )

    def add(self, name: str, num_tokens: int, due: float = float("inf"), queue_order: int = 0) -> Sequence:
        sequence = Sequence(name, [1] * num_tokens, num_tokens, SamplingParams(max_tokens=4), due=due, queue_order=queue_order)
        self.scheduler.add(sequence)
        return sequence

    def start(self) -> list[str]:
        started = self.scheduler.start()
        for sequence in started:
            (self.scheduler.ready if self.is_prefill else self.scheduler.begin_prefill)(sequence, 0)
        return [sequence.request_id for sequence in started]

    def step(self, now_s: float) -> dict[str, int]:
        """Tokens of each prompt in the next step."""
        self.scheduler.arrange(now_s, left_s)
        step = self.scheduler.schedule()
        self.scheduler.record(step) if self.is_prefill else self.scheduler.record(step, [7] * len(step.sampled))
        return {chunk.sequence.request_id: chunk.num_tokens for chunk in step.chunks}


@pytest.fixture(params=["prefill", "decode"])
def queue(request: pytest.FixtureRequest) -> Queue:
    return Queue(request.param)


def test_who_is_due_first_is_computed_first_and_goes_on_before_later_ones(queue: Queue) -> None:
    queue.add("later", 24, due=100.0)
    queue.start()
    assert queue.step(0.0) == {"later": 16}
    queue.add("sooner", 20, due=2.4)
    queue.start()
    assert queue.step(0.0) == {"sooner": 16}
    assert queue.step(0.01) == {"sooner": 4, "later": 8}


def test_who_cannot_be_in_time_does_not_make_others_late(queue: Queue) -> None:
    queue.add("hopeless", 40, due=3.0, queue_order=1)
    queue.add("short", 16, due=3.5, queue_order=2)
    queue.start()
    assert queue.step(0.0) == {"short": 16}
    found = [queue.step(0.1 + AGAIN_S * number) for number in range(3)]
    assert found[0].pop("short", 1) == 1, "it decodes beside, where that is its worker"
    assert found[0] == {"hopeless": 16}


def test_prompts_without_a_moment_keep_their_places_before_the_others(queue: Queue) -> None:
    queue.add("due", 16, due=5.0, queue_order=0)
    queue.add("second", 16, queue_order=2)
    queue.add("first", 12, queue_order=1)
    queue.start()
    found = [name for _ in range(3) for name, num_tokens in queue.step(0.0).items() if num_tokens > 1]
    assert [*dict.fromkeys(found)] == ["first", "second", "due"]


def test_who_is_late_for_long_has_every_eighth_step(queue: Queue) -> None:
    queue.add("old", 60, due=0.0)
    now_s = LONG_S + 1.0
    queue.start()
    computed: list[str] = []
    for number in range(LONG_STEPS):
        queue.add(f"new-{number}", 16, due=now_s + 100.0)
        queue.start()
        computed += [name for name, num_tokens in queue.step(now_s).items() if num_tokens > 1]
        now_s += AGAIN_S
    assert computed.count("old") == 1 and computed[-1] == "old"


@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_late_prompts_leave_pages_to_those_that_come(half: str) -> None:
    queue = Queue(half, num_pages=20)
    queue.add("running", 16, due=9.0)
    queue.start()
    for number in range(3):
        queue.add(f"late-{number}", 16, due=0.5, queue_order=number)
    queue.step(0.0)
    assert queue.start() == ["late-0", "late-1"], "the third would take the last of the pages"
    queue.add("new", 16, due=9.0)
    queue.scheduler.arrange(1.0, left_s)
    assert queue.start() == ["new"]
