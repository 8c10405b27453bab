"""PrefillScheduler, alone: no engine, no store."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.prefill_worker.scheduler import PrefillScheduler, Step
from halfmoon.protocol.errors import ConfigError, PromptTooLong
from halfmoon.protocol.sampling import SamplingParams

BLOCK_SIZE = 4


def make_sequence(num_tokens: int, *, priority: int = 0, name: str = "r") -> Sequence:
    return Sequence(name, list(range(num_tokens)), num_tokens, SamplingParams(), queue_order=priority)


def make_scheduler(*, num_pages: int = 100, budget: int = 16) -> PrefillScheduler:
    return PrefillScheduler(PageAllocator(num_pages), BLOCK_SIZE, budget)


def start_all(scheduler: PrefillScheduler) -> list[Sequence]:
    started = scheduler.start()
    for sequence in started:
        scheduler.ready(sequence, 0)
    return started


def sizes(step: Step) -> list[int]:
    return [chunk.num_tokens for chunk in step.chunks]


def test_a_budget_below_the_block_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least the block size, 4"):
        make_scheduler(budget=3)


def test_a_prompt_larger_than_the_pages_is_refused_with_the_limit() -> None:
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(make_sequence(12))
    with pytest.raises(PromptTooLong, match=r"13 tokens.*hold 12"):
        scheduler.add(make_sequence(13))
    assert scheduler.num_waiting == 1


def test_priority_then_arrival_decides_who_starts() -> None:
    scheduler = make_scheduler()
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        scheduler.add(make_sequence(5, priority=priority, name=name))
    assert [sequence.request_id for sequence in scheduler.start()] == ["urgent", "first", "second", "late"]


def test_a_long_prompt_at_the_head_is_not_overtaken_while_it_waits_for_pages() -> None:
    scheduler = make_scheduler(num_pages=4)
    small, long, later = make_sequence(8), make_sequence(12), make_sequence(4)
    for sequence in (small, long, later):
        scheduler.add(sequence)
    assert start_all(scheduler) == [small]
    step = scheduler.schedule()
    assert scheduler.record(step) == [small]
    assert scheduler.start() == []  # its blocks are still being pushed
    scheduler.release(small)
    assert scheduler.start() == [long, later]


def test_a_prompt_is_not_computed_before_its_prefix_is_there() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(10)
    scheduler.add(sequence)
    assert scheduler.start() == [sequence]
    assert scheduler.schedule().chunks == []
    scheduler.ready(sequence, 8)
    assert scheduler.schedule().chunks == [(sequence, 8, 2)]


def test_a_prompt_cannot_be_cached_to_its_last_token() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(8)
    scheduler.add(sequence)
    scheduler.start()
    with pytest.raises(ValueError, match="at least the last one"):
        scheduler.ready(sequence, 8)
    scheduler.ready(sequence, 7)
    step = scheduler.schedule()
    assert step.chunks == [(sequence, 7, 1)] and step.sampled == [sequence]


def test_short_prompts_do_not_wait_for_the_end_of_a_long_one() -> None:
    scheduler = make_scheduler(budget=16)
    long, short = make_sequence(200), make_sequence(7)
    scheduler.add(long)
    start_all(scheduler)
    scheduler.record(scheduler.schedule())
    scheduler.add(short)
    start_all(scheduler)
    step = scheduler.schedule()
    assert step.chunks == [(long, 16, 8), (short, 0, 7)]
    assert scheduler.record(step) == [short]


def test_what_short_prompts_leave_of_the_budget_goes_to_the_earliest() -> None:
    scheduler = make_scheduler(budget=24)
    for num_tokens in (100, 2, 100):
        scheduler.add(make_sequence(num_tokens))
    start_all(scheduler)
    assert sizes(scheduler.schedule()) == [12, 2, 8]  # 8, 2, 8, and one block more


def test_the_more_urgent_take_what_they_can_use_first() -> None:
    scheduler = make_scheduler(budget=16)
    patient, urgent = make_sequence(100), make_sequence(9, priority=-1)
    for sequence in (patient, urgent):
        scheduler.add(sequence)
    start_all(scheduler)
    assert scheduler.schedule().chunks == [(urgent, 0, 9), (patient, 0, 4)]


def test_pages_of_an_aborted_prompt_stay_until_its_step_is_over_and_the_caller_lets_go() -> None:
    scheduler = make_scheduler(num_pages=4)
    sequence = make_sequence(16)
    scheduler.add(sequence)
    start_all(scheduler)
    step = scheduler.schedule()
    scheduler.abort(sequence)
    assert scheduler.num_outstanding_tokens == 0
    scheduler.release(sequence)
    assert scheduler.allocator.num_free == 0
    assert scheduler.record(step) == []
    assert scheduler.allocator.num_free == 4 and scheduler.at_rest


def test_a_prompt_aborted_in_the_queue_leaves_nothing() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(16)
    scheduler.add(sequence)
    scheduler.abort(sequence)
    scheduler.release(sequence)
    assert scheduler.at_rest and scheduler.start() == []


def test_load_counts_what_is_left_to_compute() -> None:
    scheduler = make_scheduler(num_pages=10, budget=8)
    first, second = make_sequence(20), make_sequence(30)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.start()
    scheduler.ready(first, 8)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_outstanding_tokens) == (1, 1, 42)
    scheduler.record(scheduler.schedule())
    assert scheduler.num_outstanding_tokens == 34


class Rig:
    """Drives a scheduler through any order of events and checks, after each, what must always hold."""

    def __init__(self, num_pages: int, budget: int) -> None:
        self.scheduler = make_scheduler(num_pages=num_pages, budget=budget)
        self.num_pages = num_pages
        self.budget = budget
        self.loading: list[Sequence] = []
        self.holding: list[Sequence] = []  # finished or aborted after they started
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.step: Step | None = None
        self.computed: dict[Sequence, list[int]] = {}

    def add(self, num_tokens: int, priority: int) -> None:
        sequence = make_sequence(min(num_tokens, self.num_pages * BLOCK_SIZE), priority=priority)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        self.computed[sequence] = []

    def start(self) -> None:
        self.loading += self.scheduler.start()

    def ready(self, pick: int) -> None:
        if self.loading:
            sequence = self.loading.pop(pick % len(self.loading))
            cached = min(pick % 7 * BLOCK_SIZE, sequence.num_tokens - 1)
            self.computed[sequence] = list(range(cached))
            self.scheduler.ready(sequence, cached)

    def schedule(self) -> None:
        if self.step is None:
            self.step = self.scheduler.schedule()
            assert self.step.num_tokens <= self.budget
            for sequence, start, num_tokens in self.step.chunks:
                assert num_tokens > 0 and sequence in self.live
                end = start + num_tokens
                assert end % BLOCK_SIZE == 0 or end == sequence.num_tokens
                self.computed[sequence] += range(start, end)

    def record(self) -> None:
        if self.step is not None:
            for sequence in self.scheduler.record(self.step):
                self.live.remove(sequence)
                self.finished.append(sequence)
                self.holding.append(sequence)
            self.step = None

    def abort(self, pick: int) -> None:
        if self.live:
            sequence = self.live.pop(pick % len(self.live))
            self.scheduler.abort(sequence)
            if sequence in self.loading:
                self.loading.remove(sequence)
            self.holding.append(sequence)

    def release(self, pick: int) -> None:
        if self.holding:
            self.scheduler.release(self.holding.pop(pick % len(self.holding)))

    def check(self) -> None:
        owners = {*self.live, *self.holding, *(chunk.sequence for chunk in (self.step.chunks if self.step else ()))}
        pages = [page for sequence in owners for page in sequence.pages]
        assert len(pages) == len(set(pages)), "a page has two owners"
        assert len(pages) + self.scheduler.allocator.num_free == self.num_pages, "a page has none"
        waiting = [sequence for sequence in self.live if not sequence.pages]
        assert len(waiting) == self.scheduler.num_waiting

    def finish_all(self) -> None:
        for _ in range(10_000):
            self.record()
            while self.holding:
                self.release(0)
            self.start()
            while self.loading:
                self.ready(0)
            self.check()
            if not self.live:
                break
            self.schedule()
            assert self.step is not None and self.step.chunks, "nothing runs though something waits"


EVENTS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 60), st.integers(-1, 1)),
    st.tuples(st.sampled_from(["start", "schedule", "record"])),
    st.tuples(st.sampled_from(["ready", "abort", "release"]), st.integers(0, 1000)),
)


@settings(max_examples=150)
@given(num_pages=st.integers(1, 12), budget=st.integers(BLOCK_SIZE, 40), events=st.lists(EVENTS, max_size=60))
def test_no_page_leaks_and_every_prompt_is_computed_once_and_ends(num_pages: int, budget: int, events: list[tuple]) -> None:
    rig = Rig(num_pages, budget)
    for name, *arguments in events:
        getattr(rig, name)(*arguments)
        rig.check()
    rig.finish_all()
    assert rig.scheduler.at_rest and rig.scheduler.allocator.num_free == num_pages
    for sequence in rig.finished:
        assert rig.computed[sequence] == list(range(sequence.num_tokens))


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(50, 200), min_size=1, max_size=4), short=st.integers(1, 8), budget=st.integers(8, 64))
def test_a_short_prompt_is_done_after_its_share_of_steps(lengths: list[int], short: int, budget: int) -> None:
    scheduler = make_scheduler(num_pages=1000, budget=budget)
    for length in lengths:
        scheduler.add(make_sequence(length))
    sequence = make_sequence(short)
    scheduler.add(sequence)
    start_all(scheduler)
    # at the worst a block is a prompt's share, and as many prompts as are before it take theirs first
    blocks_per_step = max(budget // BLOCK_SIZE, 1)
    limit = 2 * (1 + len(lengths) * max(lengths) // BLOCK_SIZE // blocks_per_step) if blocks_per_step <= len(lengths) else 2
    for _ in range(limit):
        if sequence in scheduler.record(scheduler.schedule()):
            return
    pytest.fail(f"not done after {limit} steps")


def test_the_scheduler_runs_where_there_is_no_torch_and_no_ray() -> None:
    code = "import sys, halfmoon.prefill_worker.scheduler; print(*sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
