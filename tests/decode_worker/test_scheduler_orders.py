"""The decode scheduler under any order of events: no page leaks, every sequence ends, and with the tokens it would have alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.decode_worker.scheduler import DecodeScheduler, Step
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.sampling import SamplingParams

BLOCK_SIZE = 4
EOS = 999
STOPS = tuple(range(0, EOS, 9))


def token_after(token_ids: list[int]) -> int:
    """A pure function of what precedes, so that a recomputed sequence has to give the same."""
    return (sum(token_ids) * 31 + len(token_ids)) % EOS


def next_token(sequence: Sequence) -> int:
    return token_after(sequence.token_ids)


def alone(sequence: Sequence) -> list[int]:
    """The tokens that it would have if it were the only one, each step recorded before the next."""
    found = Sequence("alone", sequence.token_ids[: sequence.num_prompt_tokens], sequence.num_prompt_tokens, sequence.sampling)
    while found.finish_reason(frozenset({EOS})) is None:
        found.token_ids.append(next_token(found))
    return found.token_ids


class Rig:
    """Drives a scheduler through any order of events and checks, after each, what must always hold.

    Steps run one after another: what one computes is known as soon as it is launched, and the host hears of it with the record.
    """

    def __init__(self, num_pages: int, max_running: int, recompute: int) -> None:
        self.scheduler = DecodeScheduler(
            PageAllocator(num_pages),
            BLOCK_SIZE,
            eos_token_ids=frozenset({EOS}),
            max_running=max_running,
            max_prefill_tokens_per_step=recompute,
        )
        self.num_pages, self.max_running, self.recompute = num_pages, max_running, recompute
        self.loading: list[Sequence] = []
        self.holding: list[Sequence] = []
        self.live: list[Sequence] = []
        self.cached: dict[Sequence, int] = {}  # of those without a hand-off
        self.finished: list[Sequence] = []
        self.everyone: list[Sequence] = []
        self.steps: list[tuple[Step, dict[Sequence, int]]] = []  # launched and not recorded, with the tokens they gave
        self.written: dict[int, Sequence] = {}  # pages that they may write, and whose they are

    def add(self, num_tokens: int, max_tokens: int, priority: int, num_cached_tokens: int | None = None) -> None:
        """num_cached_tokens: without a hand-off."""
        limit = self.num_pages * BLOCK_SIZE
        num_tokens = min(num_tokens, limit - 1)
        max_tokens = min(max_tokens, limit - num_tokens)
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=STOPS, min_tokens=max_tokens // 3)
        sequence = Sequence("r", list(range(num_tokens)), num_tokens, params, queue_order=priority)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        self.everyone.append(sequence)
        if num_cached_tokens is not None:
            self.cached[sequence] = min(num_cached_tokens, num_tokens - 1)

    def start(self) -> None:
        self.loading += self.scheduler.start()

    def admit(self, pick: int) -> None:
        if self.loading:
            sequence = self.loading.pop(pick % len(self.loading))
            if sequence in self.cached:
                self.scheduler.begin_prefill(sequence, self.cached[sequence])
            elif self.scheduler.admit(sequence, next_token(sequence)) is not None:
                self.end(sequence)

    def schedule(self) -> None:
        if not self.steps:
            running = [sequence for sequence in self.live if sequence.pages and sequence not in self.loading]
            step = self.scheduler.schedule()
            self.check_fairness(step, [sequence for sequence in running if sequence.pages])
            self.check_budget(step)
            self.launch(step)

    def check_budget(self, step: Step) -> None:
        """Chunks begin where the steps under way end; those of sequences that lack more than one token share the budget."""
        under_way, num_prefill_tokens = self.steps[0] if self.steps else (Step([], [], []), {}), 0
        for sequence, start, size in step.chunks:
            pending = sum(chunk.num_tokens for chunk in under_way[0].chunks if chunk.sequence is sequence)
            assert start == sequence.num_computed_tokens + pending
            num_tokens = sequence.num_tokens + (sequence in under_way[0].sampled)
            num_prefill_tokens += size if num_tokens - start > 1 else 0
        assert num_prefill_tokens <= self.recompute, "prefill past its budget"

    def schedule_ahead(self) -> None:
        if len(self.steps) == 1:
            num_preemptions = [self.scheduler.num_preemptions(sequence) for sequence in self.live]
            step = self.scheduler.schedule_ahead()
            assert num_preemptions == [self.scheduler.num_preemptions(sequence) for sequence in self.live]
            if step is not None and step.chunks:
                assert not step.preempted
                self.check_budget(step)
                self.launch(step)

    def withdraw(self) -> None:
        if len(self.steps) == 2:
            self.scheduler.withdraw(self.steps.pop()[0])
            self.written = {page: sequence for page, sequence in self.written.items() if sequence in self.steps[0][1]}

    def launch(self, step: Step) -> None:
        """Computes what the step does from the tokens that are there and those on their way."""
        assert len(step.chunks) <= self.max_running
        on_their_way = {sequence: self.steps[0][1][sequence] for sequence in self.steps[0][0].sampled} if self.steps else {}
        tokens: dict[Sequence, int] = {}
        for sequence, start, num_tokens in step.chunks:
            known = [*sequence.token_ids, *([on_their_way[sequence]] if sequence in on_their_way else [])]
            assert sequence in self.live
            assert len(known) - sequence.num_prompt_tokens < sequence.sampling.max_tokens, "it is sure to have ended"
            assert start + num_tokens <= len(sequence.pages) * BLOCK_SIZE, "no page for the token"
            assert (start + num_tokens == len(known)) == (sequence in step.sampled)
            tokens[sequence] = token_after(known)
            self.written.update(dict.fromkeys(sequence.pages, sequence))
        self.steps.append((step, tokens))

    def check_fairness(self, step: Step, running: list[Sequence]) -> None:
        """While there is room in the step, it holds every sequence that lacks one token, and one of those that lack more."""
        chosen = {chunk.sequence for chunk in step.chunks}
        if len(chosen) < self.max_running:
            left = [sequence for sequence in running if sequence not in chosen]
            lacking = [sequence.num_tokens - sequence.num_computed_tokens for sequence in left]
            assert 1 not in lacking, "a sequence was left out that lacks one token"
            assert not left or any(sequence.num_tokens - sequence.num_computed_tokens > 1 for sequence in chosen), "no prefill goes on"

    def record(self) -> None:
        if self.steps:
            step, tokens = self.steps.pop(0)
            left = {chunk.sequence for other, _ in self.steps for chunk in other.chunks}
            self.written = {page: sequence for page, sequence in self.written.items() if sequence in left}
            for item in self.scheduler.record(step, [tokens[sequence] for sequence in step.sampled]):
                if item.finish_reason is not None:
                    self.end(item.sequence)

    def finish(self, pick: int) -> None:
        if self.live:
            sequence = self.live[pick % len(self.live)]
            assert self.scheduler.finish(sequence)
            self.end(sequence)

    def abort(self, pick: int) -> None:
        if self.live:
            sequence = self.live.pop(pick % len(self.live))
            self.scheduler.abort(sequence)
            if sequence in self.loading:
                self.loading.remove(sequence)
            self.holding.append(sequence)

    def end(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        if sequence in self.loading:
            self.loading.remove(sequence)
        self.finished.append(sequence)
        self.holding.append(sequence)

    def release(self, pick: int) -> None:
        if self.holding:
            self.scheduler.release(self.holding.pop(pick % len(self.holding)))

    def check(self) -> None:
        owners = {*self.live, *self.holding, *(chunk.sequence for step, _ in self.steps for chunk in step.chunks)}
        pages = [page for sequence in owners for page in sequence.pages]
        assert len(pages) == len(set(pages)), "a page has two owners"
        assert len(pages) + self.scheduler.allocator.num_free == self.num_pages, "a page has none"
        assert all(page in sequence.pages for page, sequence in self.written.items()), "a page was given away while a step writes to it"
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def finish_all(self, ahead: bool = True) -> None:
        for _ in range(10_000):
            self.record()
            while self.holding or self.loading:
                self.release(0)
                self.admit(0)
            self.start()
            if self.loading:
                continue
            self.check()
            if not self.live and not self.steps:
                return
            self.schedule()
            assert self.steps[0][0].chunks or self.steps[0][0].preempted, "nothing runs though something waits"
            if ahead:
                self.schedule_ahead()
                self.check()
        pytest.fail("the sequences do not end")


EVENTS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 30), st.integers(-1, 1), st.none() | st.integers(0, 30)),
    st.tuples(st.sampled_from(["start", "schedule", "record", "schedule", "record", "schedule_ahead", "schedule_ahead", "withdraw"])),
    st.tuples(st.sampled_from(["admit", "admit", "abort", "finish", "release"]), st.integers(0, 1000)),
)


@settings(max_examples=150)
@given(
    num_pages=st.integers(1, 12),
    max_running=st.integers(1, 6),
    recompute=st.integers(1, 12),
    events=st.lists(EVENTS, max_size=80),
)
def test_no_page_leaks_and_every_sequence_ends(num_pages: int, max_running: int, recompute: int, events: list[tuple]) -> None:
    rig = Rig(num_pages, max_running, recompute)
    for name, *arguments in events:
        getattr(rig, name)(*arguments)
        rig.check()
    rig.finish_all()
    assert rig.scheduler.at_rest and rig.scheduler.allocator.num_free == num_pages
    for sequence in rig.everyone:
        assert sequence.token_ids == alone(sequence)[: sequence.num_tokens], "it has another's token, or misses one"


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 20), st.none() | st.integers(0, 15)), min_size=1, max_size=8),
    num_pages=st.integers(9, 14),
    recompute=st.integers(1, 9),
    ahead=st.booleans(),
)
def test_tokens_depend_neither_on_preemption_nor_on_steps_ahead(
    lengths: list[tuple[int, int, int | None]], num_pages: int, recompute: int, ahead: bool
) -> None:
    rig = Rig(num_pages, 8, recompute)
    for num_tokens, max_tokens, num_cached_tokens in lengths:
        rig.add(num_tokens, max_tokens, 0, num_cached_tokens)
    rig.finish_all(ahead)
    assert len(rig.finished) == len(lengths)
    assert all(sequence.token_ids == alone(sequence) for sequence in rig.finished)
