"""Steps of both halves: budgets, order, and every order of events on one pool of pages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.decode_worker.scheduler import DecodeScheduler
from halfmoon.engine.combined_scheduler import CombinedScheduler, CombinedStep
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.engine.step_budget import StepBudget
from halfmoon.prefill_worker.scheduler import PrefillScheduler
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.timing.step_cost import StepCost
from halfmoon.protocol.timing.step_limits import StepLimits

BLOCK_SIZE = 4
COST = StepCost(read_s=0.01, chunk_s=0.0, per_token_s=0.001, per_attention_s=0.0, per_decode_s=0.0, per_context_s=0.0)
EOS = 999


def token_after(token_ids: list[int]) -> int:
    """A pure function of what precedes, so that a recomputed sequence has to give the same."""
    return (sum(token_ids) * 31 + len(token_ids)) % 500


class Rig:
    """Both schedulers over one allocator, driven as a worker drives them, with what must always hold checked on the way."""

    def __init__(
        self, num_pages: int = 100, *, beside: int = 8, alone: int = 16, max_running: int = 8, num_reserved: int = 0, target_s: float = 0.0
    ) -> None:
        self.allocator = PageAllocator(num_pages)
        self.decode = DecodeScheduler(
            self.allocator, BLOCK_SIZE, eos_token_ids=frozenset({EOS}), max_running=max_running, max_prefill_tokens_per_step=beside
        )
        self.prefill = PrefillScheduler(self.allocator, BLOCK_SIZE, alone)
        self.prefill.num_reserved_pages = num_reserved
        limits = StepLimits(alone, beside, tpot_target_s=target_s)
        self.budget = StepBudget(limits, COST, 1, ())
        self.scheduler = CombinedScheduler(self.decode, self.prefill, self.budget)
        self.num_pages, self.beside, self.alone, self.num_reserved = num_pages, beside, alone, num_reserved
        self.decoding: list[Sequence] = []  # live, in the decode half
        self.prompts: list[Sequence] = []  # live, in the prefill half
        self.loading: list[Sequence] = []  # of either half
        self.local: set[Sequence] = set()
        self.holding: list[tuple[Any, Sequence]] = []  # ended, and not released
        self.steps: list[tuple[CombinedStep, dict[Sequence, int]]] = []  # launched and not recorded, with the tokens they give
        self.computed: dict[Sequence, list[int]] = {}  # of prompts to hand off: the tokens computed, in order
        self.handed_off: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.names = itertools.count()
        self.now = 0.0

    def sequence(self, num_tokens: int, max_tokens: int, priority: int = 0) -> Sequence:
        num_tokens = min(num_tokens, self.num_pages * BLOCK_SIZE - 1)
        max_tokens = min(max_tokens, self.num_pages * BLOCK_SIZE - num_tokens)
        params = SamplingParams(max_tokens=max_tokens)
        return Sequence(f"r{next(self.names)}", list(range(num_tokens)), num_tokens, params, queue_order=priority)

    def add_decode(self, num_tokens: int, max_tokens: int, local: bool, priority: int = 0) -> Sequence:
        sequence = self.sequence(num_tokens, max_tokens, priority)
        self.decode.add(sequence)
        self.decoding.append(sequence)
        self.local |= {sequence} if local else set()
        return sequence

    def add_prompt(self, num_tokens: int, priority: int = 0) -> Sequence:
        sequence = self.sequence(num_tokens, 8, priority)
        self.prefill.add(sequence)
        self.prompts.append(sequence)
        self.computed[sequence] = []
        return sequence

    def start(self) -> None:
        self.loading += [*self.decode.start(), *self.prefill.start()]

    def admit(self, pick: int, num_cached_tokens: int = 0) -> None:
        if not self.loading:
            return
        sequence = self.loading.pop(pick % len(self.loading))
        num_cached_tokens = min(num_cached_tokens // BLOCK_SIZE * BLOCK_SIZE, sequence.num_tokens - 1)
        if sequence in self.prompts:
            self.computed[sequence] = list(range(num_cached_tokens))
            self.prefill.ready(sequence, num_cached_tokens)
        elif sequence in self.local:
            self.decode.begin_prefill(sequence, num_cached_tokens)
        elif self.decode.admit(sequence, token_after(sequence.token_ids)) is not None:
            self.end(self.decode, sequence)

    def schedule(self) -> CombinedStep | None:
        if self.steps:
            return None
        step = self.scheduler.schedule(self.now)
        if step is not None:
            self.launch(step)
        return step

    def schedule_ahead(self) -> CombinedStep | None:
        if len(self.steps) != 1:
            return None
        step = self.scheduler.schedule_ahead(self.now)
        if step is not None:
            assert step.chunks and not step.decode.preempted
            self.launch(step)
        return step

    def launch(self, step: CombinedStep) -> None:
        self.check_budget(step)
        coming = self.steps[0][0].decode.sampled if self.steps else []
        on_their_way = {sequence: self.steps[0][1][sequence] for sequence in coming}
        tokens: dict[Sequence, int] = {}
        for sequence, start, num_tokens in step.chunks:
            known = [*sequence.token_ids, *([on_their_way[sequence]] if sequence in on_their_way else [])]
            assert start + num_tokens <= min(len(sequence.pages) * BLOCK_SIZE, len(known)), "no page, or no token"
            tokens[sequence] = token_after(known)
            if sequence in self.computed:
                self.computed[sequence] += range(start, start + num_tokens)
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks), "a sequence is in the step twice"
        self.steps.append((step, tokens))

    def check_budget(self, step: CombinedStep) -> None:
        decoded = [one for one in step.decode.chunks if one.num_tokens == 1 and one.start + 1 >= one.sequence.num_tokens]
        num_prefill = sum(one.num_tokens for one in step.chunks) - len(decoded)
        num_own = sum(one.num_tokens for one in step.decode.chunks) - len(decoded)
        assert num_own <= self.beside
        limit = max(self.beside, BLOCK_SIZE) if decoded else max(self.alone, num_own)
        assert num_prefill <= limit, "prefill past its budget"
        if step.prefill is not None:
            assert all((one.start + one.num_tokens) % BLOCK_SIZE == 0 or one.is_last for one in step.prefill.chunks)

    def record(self) -> None:
        if not self.steps:
            return
        step, tokens = self.steps.pop(0)
        sampled = [] if step.prefill is None else list(step.prefill.sampled)
        for item in self.decode.record(step.decode, [tokens[sequence] for sequence in step.decode.sampled]):
            if item.finish_reason is not None:
                self.end(self.decode, item.sequence)
        if step.prefill is not None:
            finished = self.prefill.record(step.prefill)
            assert finished == [sequence for sequence in sampled if sequence in self.prompts]
            for sequence in finished:
                self.handed_off.append(sequence)
                self.end(self.prefill, sequence)

    def end(self, scheduler: Any, sequence: Sequence) -> None:
        (self.decoding if scheduler is self.decode else self.prompts).remove(sequence)
        self.ended += [sequence] if scheduler is self.decode else []
        self.holding.append((scheduler, sequence))

    def abort(self, pick: int) -> None:
        live = [*self.decoding, *self.prompts]
        if live:
            sequence = live[pick % len(live)]
            scheduler = self.decode if sequence in self.decoding else self.prefill
            scheduler.abort(sequence)
            (self.decoding if sequence in self.decoding else self.prompts).remove(sequence)
            if sequence in self.loading:
                self.loading.remove(sequence)
            self.computed.pop(sequence, None)
            self.holding.append((scheduler, sequence))

    def release(self, pick: int) -> None:
        if self.holding:
            scheduler, sequence = self.holding.pop(pick % len(self.holding))
            scheduler.release(sequence)

    def check(self) -> None:
        under_way = (chunk.sequence for step, _ in self.steps for chunk in step.chunks)
        owners = {*self.decoding, *self.prompts, *(sequence for _, sequence in self.holding), *under_way}
        pages = [page for sequence in owners for page in sequence.pages]
        assert len(pages) == len(set(pages)), "a page has two owners"
        assert len(pages) + self.allocator.num_free == self.num_pages, "a page has none"
        prompts = [*self.prompts, *(sequence for scheduler, sequence in self.holding if scheduler is self.prefill)]
        held = [len(sequence.pages) for sequence in prompts if sequence.pages]
        assert len(held) <= 1 or sum(held) <= self.num_pages - self.num_reserved, "prompts took reserved pages"
        for sequence, tokens in self.computed.items():
            assert tokens == list(range(len(tokens))), f"{sequence.request_id}: a token was computed twice, or left out"

    def finish_all(self, ahead: bool = True) -> None:
        for _ in range(20_000):
            self.record()
            while self.holding or self.loading:
                self.release(0)
                self.admit(0)
            self.start()
            if self.loading:
                continue
            self.check()
            if not (self.decoding or self.prompts or self.steps):
                return
            if not self.steps:
                step = self.schedule()
                assert step is not None, "nothing runs though something waits"
            if ahead:
                self.schedule_ahead()
        pytest.fail("the sequences do not end")


def sizes(step: CombinedStep | None) -> tuple[list[int], list[int]]:
    """Of decode's chunks, and of prefill's."""
    assert step is not None
    return [one.num_tokens for one in step.decode.chunks], [] if step.prefill is None else [one.num_tokens for one in step.prefill.chunks]


def running(rig: Rig, *prompts: int, local: tuple[int, ...] = (), decoding: tuple[int, ...] = ()) -> Rig:
    for num_tokens in decoding:
        rig.add_decode(num_tokens, 20, local=False)
    for num_tokens in local:
        rig.add_decode(num_tokens, 20, local=True)
    for num_tokens in prompts:
        rig.add_prompt(num_tokens)
    rig.start()
    while rig.loading:
        rig.admit(0)
    return rig


def test_prompts_alone_have_the_prefill_half_s_own_budget() -> None:
    assert sizes(running(Rig(beside=8, alone=16), 40).schedule()) == ([], [16])


def test_beside_decode_tokens_they_have_what_the_decode_half_leaves_of_its_budget() -> None:
    assert sizes(running(Rig(beside=8, alone=16), 40, decoding=(5, 6)).schedule()) == ([1, 1], [8])
    assert sizes(running(Rig(beside=11, alone=16), 40, decoding=(5,), local=(3,)).schedule()) == ([1, 3], [8])
    assert sizes(running(Rig(beside=8, alone=16), 40, decoding=(5,), local=(30,)).schedule()) == ([1, 8], [])


def test_beside_prompts_of_the_decode_half_alone_they_fill_the_step() -> None:
    assert sizes(running(Rig(beside=8, alone=16), 40, local=(30,)).schedule()) == ([8], [8])


def test_a_budget_smaller_than_a_block_lets_a_block_in() -> None:
    assert sizes(running(Rig(beside=1, alone=16), 40, decoding=(5,)).schedule()) == ([1], [4])


def test_chunks_of_both_halves_go_ahead_one_behind_the_other() -> None:
    rig = running(Rig(beside=8, alone=16), 20, decoding=(5,), local=(6,))
    assert sizes(rig.schedule()) == ([1, 6], [])
    assert sizes(rig.schedule_ahead()) == ([1, 1], [8]), "the local prompt's first token is on its way"
    rig.record()
    assert sizes(rig.schedule_ahead()) == ([1, 1], [8])
    rig.record()
    assert sizes(rig.schedule_ahead()) == ([1, 1], [4])
    rig.record()
    assert sizes(rig.schedule_ahead()) == ([1, 1], []), "all of the prompt is on its way"
    rig.finish_all()


def test_a_prompt_that_becomes_ready_is_in_the_very_next_step_that_is_scheduled() -> None:
    rig = running(Rig(), decoding=(5,))
    assert rig.schedule() is not None and rig.schedule_ahead() is not None
    rig.record()
    rig.add_prompt(12)
    rig.start()
    rig.admit(0)
    assert sizes(rig.schedule_ahead()) == ([1], [8])


def test_a_withdrawn_step_leaves_its_sequences_as_they_were() -> None:
    rig = running(Rig(), 20, decoding=(5,))
    rig.schedule()
    ahead = rig.schedule_ahead()
    assert sizes(ahead) == ([1], [8]) and ahead is not None
    rig.steps.pop()
    rig.scheduler.withdraw(ahead)
    for chunk in ahead.prefill.chunks if ahead.prefill is not None else ():
        del rig.computed[chunk.sequence][chunk.start :]
    rig.finish_all(ahead=False)
    assert len(rig.ended) == 1 and len(rig.ended[0].token_ids) == 25 and len(rig.handed_off) == 1


def test_reserved_pages_are_left_to_who_decodes_but_for_one_prompt_alone() -> None:
    rig = running(Rig(num_pages=10, num_reserved=6), 12, 12)
    assert rig.prefill.num_running == 1 and rig.allocator.num_free == 7, "the second one would take from the reserved six"
    late = rig.add_decode(20, 4, local=True)
    rig.start()
    assert late.pages
    rig.admit(0)
    rig.finish_all()
    alone = running(Rig(num_pages=10, num_reserved=6), 39)
    assert alone.prefill.num_running == 1
    alone.finish_all()
    assert len(alone.handed_off) == 1


EVENTS = st.one_of(
    st.tuples(st.just("add_decode"), st.integers(1, 30), st.integers(1, 20), st.booleans(), st.integers(-1, 1)),
    st.tuples(st.just("add_prompt"), st.integers(1, 40), st.integers(-1, 1)),
    st.tuples(st.sampled_from(["start", "schedule", "record", "schedule", "record", "schedule_ahead"])),
    st.tuples(st.sampled_from(["admit", "admit"]), st.integers(0, 1000), st.integers(0, 40)),
    st.tuples(st.sampled_from(["abort", "release", "release"]), st.integers(0, 1000)),
)


@settings(max_examples=200)
@given(
    num_pages=st.integers(2, 14),
    beside=st.integers(1, 12),
    alone=st.integers(BLOCK_SIZE, 24),
    max_running=st.integers(1, 5),
    reserve=st.booleans(),
    events=st.lists(EVENTS, max_size=80),
)
def test_in_any_order_each_token_is_computed_once_and_everything_ends(
    num_pages: int, beside: int, alone: int, max_running: int, reserve: bool, events: list[tuple]
) -> None:
    rig = Rig(num_pages, beside=beside, alone=alone, max_running=max_running, num_reserved=num_pages // 2 if reserve else 0)
    for name, *arguments in events:
        getattr(rig, name)(*arguments)
        rig.check()
    rig.finish_all()
    assert rig.decode.at_rest and rig.prefill.at_rest and rig.allocator.num_free == num_pages
    for sequence in rig.handed_off:
        assert rig.computed[sequence] == list(range(sequence.num_prompt_tokens)), "the whole prompt, once"
    for sequence in rig.ended:
        tokens = sequence.token_ids[: sequence.num_prompt_tokens]
        while len(tokens) < sequence.num_tokens:
            tokens.append(token_after(tokens))
        assert sequence.token_ids == tokens and sequence.num_output_tokens == sequence.sampling.max_tokens


def sized(rig: Rig) -> list[int]:
    """Chunks of the next step, prompts of both halves together, its decode tokens left out."""
    step = rig.schedule()
    assert step is not None
    return [one.num_tokens for one in step.chunks if not one.is_decode]


def test_chunks_are_as_large_as_the_tightest_pace_of_those_who_decode_allows() -> None:
    """1 ms a token. 64 tokens go in any case, so the paces leave room for more; 92 % of them counts."""
    for tpot_s, expected in ((0.01, 64), (0.1, 64), (0.3, 256), (9.0, 400)):
        rig = running(Rig(500, beside=400, alone=1000, target_s=tpot_s), 1200, decoding=(5, 6))
        assert sized(rig) == [expected]
        rig = running(Rig(500, beside=400, alone=1000, target_s=9.0), decoding=(5, 6))
        rig.decoding[1].tpot_slo_s = tpot_s
        assert sized(running(rig, 1200)) == [expected], "one of them is in a hurry"


def test_without_decode_tokens_a_step_holds_what_prefill_takes() -> None:
    assert sized(running(Rig(500, beside=400, alone=1000, target_s=0.01), 1200)) == [1000]


def test_what_was_saved_so_far_is_lent_to_a_larger_chunk() -> None:
    rig = running(Rig(500, beside=1000, alone=1000, target_s=0.3), 1200, decoding=(5,))
    one = rig.decoding[0]
    one.paced_at, one.paced_from, rig.now = 10.0, -4, 10.1  # five tokens since, in a tenth of a second; 276 ms each were allowed
    assert sized(rig) == [576], "276 ms and a quarter of 1.28 s, but not more than 300 ms: 576, that is 9 times 64"
