"""DecodeBatch counts steps; the scheduler under it, called every step, is the reference."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.decode_worker.scheduler import DecodeScheduler
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.simulator.decode_batch import DecodeBatch, decode_sequence

PAGE = 8


class Arrival(NamedTuple):
    step: int
    num_prompt: int
    num_output: int


def literal(arrivals: list[Arrival], num_pages: int, max_running: int) -> dict[str, tuple[int, list[int]]]:
    """request -> (admitted before step, the steps that gave it a token), by schedule() and record() every step."""
    allocator = PageAllocator(num_pages)
    scheduler = DecodeScheduler(allocator, PAGE, eos_token_ids=frozenset(), max_running=max_running, max_prefill_tokens_per_step=16)
    found: dict[str, tuple[int, list[int]]] = {}
    left = sorted(enumerate(arrivals), key=lambda one: one[1].step)
    step_number = 0
    while left or not scheduler.at_rest:
        while left and left[0][1].step <= step_number:
            number, arrival = left.pop(0)
            sampling = SamplingParams(max_tokens=arrival.num_output, ignore_eos=True)
            scheduler.add(Sequence(str(number), [0] * arrival.num_prompt, arrival.num_prompt, sampling))
        while started := scheduler.start():
            for sequence in started:
                found[sequence.request_id] = (step_number, [])
                if scheduler.admit(sequence, 0) is not None:
                    scheduler.release(sequence)
        step = scheduler.schedule()
        if step.chunks:
            for token in scheduler.record(step, [0] * len(step.sampled)):
                found[token.sequence.request_id][1].append(step_number)
                if token.finish_reason is not None:
                    scheduler.release(token.sequence)
        step_number += 1
    assert allocator.num_free == num_pages
    return found


def counted(arrivals: list[Arrival], num_pages: int, max_running: int, rng: random.Random) -> dict[str, tuple[int, list[int]]]:
    """The same by DecodeBatch, in runs of equal steps that are cut at arrivals and at random."""
    allocator = PageAllocator(num_pages)
    batch = DecodeBatch(allocator, PAGE, max_running=max_running, max_prefill_tokens_per_step=16)
    found: dict[str, tuple[int, list[int]]] = {}
    left = sorted(enumerate(arrivals), key=lambda one: one[1].step)
    step_number = 0
    while left or not batch.at_rest:
        while left and left[0][1].step <= step_number:
            number, arrival = left.pop(0)
            batch.add(decode_sequence(str(number), arrival.num_prompt, arrival.num_prompt, arrival.num_output, 0, batch.steps))
        while started := batch.start():
            for sequence in started:
                found[sequence.request_id] = (step_number, [])
                if batch.join(sequence):
                    batch.release(sequence)
        whole = batch.prepare() if batch.has_work else None
        if whole is not None:
            if whole.chunks:
                for sequence in batch.end_whole(whole).got_token:
                    found[sequence.request_id][1].append(step_number)
            step_number += 1
        elif batch.num_batch:
            num_steps = rng.randint(1, batch.num_same_steps())
            if left:
                num_steps = max(min(num_steps, left[0][1].step - step_number), 1)
            running = [sequence.request_id for sequence in batch._batch]
            assert batch.num_kv_tokens == sum(sequence.num_tokens for sequence in batch._batch)
            for request_id in running:
                found[request_id][1].extend(range(step_number, step_number + num_steps))
            batch.count(num_steps)
            step_number += num_steps
        else:
            step_number += 1
        assert allocator.num_free >= 0
    assert allocator.num_free == num_pages
    return found


@settings(max_examples=150)
@given(
    arrivals=st.lists(st.builds(Arrival, st.integers(0, 40), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12),
    num_pages=st.integers(9, 30),
    max_running=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_counted_steps_give_every_token_in_the_step_in_which_the_scheduler_called_every_step_gives_it(
    arrivals: list[Arrival], num_pages: int, max_running: int, seed: int
) -> None:
    assert counted(arrivals, num_pages, max_running, random.Random(seed)) == literal(arrivals, num_pages, max_running)


def test_a_preempted_sequence_recomputes_and_ends_in_the_same_step_as_with_the_plain_scheduler() -> None:
    arrivals = [Arrival(0, 30, 30), Arrival(0, 30, 30), Arrival(3, 8, 4)]
    found = counted(arrivals, 9, 8, random.Random(1))
    assert found == literal(arrivals, 9, 8)
    gaps = [later - earlier for _, steps in found.values() for earlier, later in itertools.pairwise(steps)]
    assert max(gaps) > 1, "the pages were meant to run out"
