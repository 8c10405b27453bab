from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.decode_worker.scheduler import DecodeScheduler
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.prefill_worker.scheduler import PrefillScheduler
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.queue_order import AGEING, GIVE_WAY, LONGEST_S, NO_SLO_S, first_token_due_s, queue_order

moments = st.floats(0, 1e5, allow_nan=False)


@given(first=moments, later=moments)
def test_with_one_slo_for_all_earliest_deadline_is_first_come_first_served(first: float, later: float) -> None:
    for order in ("fcfs", "edf"):
        one, other = (queue_order(order, arrival_s=moment, ttft_slo_s=30.0) for moment in sorted((first, later)))
        assert one <= other


def test_a_tighter_slo_and_a_more_urgent_class_go_before() -> None:
    usual = queue_order("edf", arrival_s=10.0, ttft_slo_s=30.0)
    assert queue_order("edf", arrival_s=12.0, ttft_slo_s=5.0) < usual
    assert queue_order("edf", arrival_s=12.0, ttft_slo_s=30.0, priority=-1) < usual
    assert queue_order("edf", arrival_s=9.0, ttft_slo_s=math.inf) < usual, "no SLO counts as some"


@given(arrival=moments, slo=st.floats(0.1, 60), predicted=st.floats(0, 1e4))
def test_who_is_too_late_anyway_gives_way_but_not_for_ever(arrival: float, slo: float, predicted: float) -> None:
    found = queue_order("late", arrival_s=arrival, ttft_slo_s=slo, predicted_ttft_s=predicted)
    in_time = queue_order("edf", arrival_s=arrival, ttft_slo_s=slo)
    assert (found == in_time) if predicted <= slo else (found > in_time)
    # whoever comes after its extended deadline goes behind it: nothing starves
    assert found <= queue_order("late", arrival_s=arrival + GIVE_WAY * slo, ttft_slo_s=slo, predicted_ttft_s=0.0)


works = st.floats(0.0, 20.0)


@given(arrival=moments, work=works, slo=st.floats(0.1, 60) | st.just(math.inf), later=works)
def test_the_shortest_goes_first_and_passes_nobody_for_longer_than_his_own_work_allows(
    arrival: float, work: float, slo: float, later: float
) -> None:
    def place(arrival_s: float, work_s: float) -> int:
        return queue_order("short", arrival_s=arrival_s, ttft_slo_s=slo, work_s=work_s)

    found = place(arrival, work)
    assert place(arrival, min(work, later)) <= found, "of those that came at once"
    # however short: who comes after that goes behind it
    assert found <= place(arrival + AGEING * work, 0.0)
    assert found <= place(arrival + LONGEST_S, 0.0)


@given(arrival=moments, work=works, slo=st.floats(0.1, 60))
def test_a_first_token_is_due_within_its_slo_and_without_one_after_what_its_work_allows(arrival: float, work: float, slo: float) -> None:
    assert arrival < first_token_due_s("short", arrival_s=arrival, ttft_slo_s=slo, work_s=work) < arrival + slo
    own = first_token_due_s("short", arrival_s=arrival, ttft_slo_s=math.inf, work_s=work)
    assert arrival + NO_SLO_S <= own <= arrival + NO_SLO_S + LONGEST_S
    assert first_token_due_s("fcfs", arrival_s=arrival, ttft_slo_s=slo) == math.inf


@given(st.integers(20, 60), st.floats(0.3, 0.95), st.integers(0, 1000))
def test_a_long_prompt_ends_within_its_bound_under_an_endless_stream_of_short_ones(long: int, load: float, seed: int) -> None:
    """The prefill workers' own scheduler, a token a step of a second, short prompts at a steady share of what it can do."""
    rng = random.Random(seed)
    scheduler = PrefillScheduler(PageAllocator(4000), 1, 1)

    def add(name: str, arrival_s: float, num_tokens: int) -> None:
        place = queue_order("short", arrival_s=arrival_s, ttft_slo_s=math.inf, work_s=float(num_tokens))
        scheduler.add(Sequence(name, [1] * num_tokens, num_tokens, SamplingParams(max_tokens=1), queue_order=place))

    add("long", 0.0, long)
    now, ended = 0, False
    while not ended:
        if rng.random() < load:
            add(f"short {now}", float(now), 1)
        for sequence in scheduler.start():
            scheduler.ready(sequence, 0)
        for sequence in scheduler.record(scheduler.schedule()):
            scheduler.release(sequence)
            ended = ended or sequence.request_id == "long"
        now += 1
        # all that may pass it has come by then, and can't be more than a token a second
        assert now <= (AGEING + 1) * long + 1


ORDERED = ("fcfs", "edf", "late", "short")


@pytest.mark.parametrize("order", ORDERED)
def test_a_decade_of_uptime_and_the_farthest_classes_fit_into_the_message(order: Any) -> None:
    for priority in (-(2**31), 2**31 - 1):
        place = queue_order(order, arrival_s=10 * 365 * 86400.0, ttft_slo_s=7 * 86400.0, predicted_ttft_s=math.inf, priority=priority)
        assert common_pb2.SequenceSpec(queue_order=place).queue_order == place, "as it was, not wrapped"
        spec = common_pb2.SequenceSpec(queue_order=place, sampling=SamplingParams(max_tokens=1).to_proto())
        assert Sequence.from_proto(spec).queue_order == place


Arrival = tuple[int, int, float]  # step, tokens, SLO in steps


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.sampled_from([1.0, 5.0, 20.0])), min_size=1, max_size=30))
def test_every_step_computes_the_earliest_deadline_and_nobody_starves(arrivals: list[Arrival]) -> None:
    """The prefill workers' own scheduler, one step a second. Who comes after a deadline has a later one, so only the few that are due
    before a request are computed before it."""
    scheduler = PrefillScheduler(PageAllocator(200), 16, 32)
    deadlines: dict[Sequence, float] = {}
    waiting = sorted(arrivals)
    now = 0
    while waiting or deadlines:
        while waiting and waiting[0][0] <= now:
            arrival, num_tokens, slo = waiting.pop(0)
            place = queue_order("edf", arrival_s=float(arrival), ttft_slo_s=slo)
            sequence = Sequence(f"{arrival}", [1] * num_tokens, num_tokens, SamplingParams(max_tokens=1), queue_order=place)
            assert all(place > other.queue_order for other, due in deadlines.items() if due < arrival)
            deadlines[sequence] = arrival + slo
            scheduler.add(sequence)
        for sequence in scheduler.start():
            scheduler.ready(sequence, 0)
        step = scheduler.schedule()
        if deadlines:
            first = min(deadlines.values())
            assert any(deadlines[chunk.sequence] == first for chunk in step.chunks)
        for sequence in scheduler.record(step):
            scheduler.release(sequence)
            del deadlines[sequence]
        now += 1
        assert now <= 41 + sum(num_tokens for _, num_tokens, _ in arrivals)


def test_a_decode_worker_preempts_the_latest_deadline_and_ends_the_earliest_first() -> None:
    scheduler = DecodeScheduler(PageAllocator(4), 4, eos_token_ids=frozenset(), max_running=8, max_prefill_tokens_per_step=64)
    sequences: list[Sequence] = []
    for number, slo in enumerate((20.0, 1.0, 5.0)):
        place = queue_order("edf", arrival_s=0.0, ttft_slo_s=slo)
        sequences.append(Sequence(f"{number}", [1] * 3, 3, SamplingParams(max_tokens=6), queue_order=place))
        scheduler.add(sequences[-1])
    for sequence in scheduler.start():
        scheduler.admit(sequence, 7)
    ended: list[Sequence] = []
    preempted: list[Sequence] = []
    while len(ended) < 3:
        step = scheduler.schedule()
        preempted += step.preempted
        for done in scheduler.record(step, [7] * len(step.sampled)):
            if done.finish_reason is not None:
                ended.append(done.sequence)
                scheduler.release(done.sequence)
        for sequence in scheduler.start():
            scheduler.admit(sequence, 7)
    assert ended == [sequences[1], sequences[2], sequences[0]]
    assert set(preempted) <= {sequences[0], sequences[2]}
