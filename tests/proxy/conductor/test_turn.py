"""When a request's turn comes on a worker, beside a worker that arranges its prompts anew whenever one is computed."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.timing.step_limits import StepLimits
from halfmoon.protocol.timing.turns import Turn, arrange, before
from halfmoon.proxy.conductor.backlog import ANYWHERE, QueuePlace, Waiting
from halfmoon.proxy.conductor.placement import MemberState, PlacementRequest, Slo, Snapshot
from halfmoon.proxy.conductor.predictors import CostModel, Predictors
from halfmoon.proxy.conductor.turn import pace_on, with_turns

NOW = 100.0
MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.02, per_sequence_s=1e-3, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip

halves = st.integers(1, 12).map(lambda half: half / 2)  # exact as floats
queues = st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 60), halves), min_size=1, max_size=12).map(
    lambda rows: [Turn((place, number), NOW + due / 2, left_s) for number, (place, due, left_s) in enumerate(rows)]
)


def computed_before(turns: list[Turn], index: int) -> list[int]:
    """A worker that has them all, and computes who is first until it is the one."""
    left, now_s, found = list(range(len(turns))), NOW, list[int]()
    while True:
        first = left[arrange([turns[other] for other in left], now_s).order[0]]
        if first == index:
            return found
        left.remove(first)
        found.append(first)
        now_s += turns[first].left_s


@given(queues, st.data())
def test_before_a_turn_come_those_whom_a_worker_computes_before_it(turns: list[Turn], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(turns) - 1))
    found = before(turns, index, NOW)
    assert sorted(found.indices) == sorted(computed_before(turns, index))
    assert found.in_time == (index in arrange(turns, NOW).order[: arrange(turns, NOW).num_in_time])


def shown(member: MemberState, place: QueuePlace, waiting: list[Waiting], num_tokens: int = 1000, slo: Slo | None = None) -> MemberState:
    snapshot = dataclasses.replace(Snapshot.of([member], [member], 64, NOW), waiting=lambda _: waiting)
    return with_turns(Predictors(MODEL), PlacementRequest(num_tokens, slo=slo, place=place), member, 0, snapshot)


def waiting(place: int, due_in_s: float, seconds: float) -> Waiting:
    return Waiting(Turn((place, 0), NOW + due_in_s, seconds), seconds * 1000)


IDLE = MemberState("w", "w", "s", num_ahead_tokens=77.0)


def test_who_can_be_in_time_waits_for_no_late_one_and_who_cannot_for_all() -> None:
    late, soon = waiting(1, 0.5, 8.0), waiting(3, 9.0, 2.0)
    found = shown(IDLE, QueuePlace(5, NOW + 4.0), [late, soon])
    assert (found.busy_until_s, found.num_ahead_tokens, found.behind_s, found.gives_way) == (NOW + 2.0, 2000.0, 8.0, False)
    found = shown(IDLE, QueuePlace(5, NOW + 0.5), [late, soon])
    assert (found.busy_until_s, found.behind_s, found.gives_way) == (NOW + 10.0, 0.0, True)


def test_whoever_is_due_at_no_moment_comes_before_all_who_are() -> None:
    found = shown(IDLE, QueuePlace(5, NOW + 4.0), [waiting(9, math.inf, 2.0), waiting(9, 3.0, 1.0)])
    assert (found.busy_until_s, found.gives_way) == (NOW + 3.0, False), "the other then has no time to spare"


def test_beside_decodes_fewer_can_be_in_time() -> None:
    busy = MemberState("w", "w", "s", num_running=20, limits=StepLimits(1000, 1000))
    slo = Slo(4.0, 0.1)
    assert pace_on(Predictors(MODEL), busy, slo.tpot_s) == pytest.approx(0.084 / 0.064), "96 ms: 64 tokens beside 20 ms of decode tokens"
    place, others = QueuePlace(5, NOW + 3.5), [waiting(1, 3.0, 1.0)]
    assert not shown(IDLE, place, others, 2000, slo).gives_way
    assert shown(busy, place, others, 2000, slo).gives_way, "3 s of prompts take 3.9 s, and it is the longest"


def test_a_request_without_a_moment_is_shown_what_the_snapshot_has() -> None:
    assert shown(IDLE, ANYWHERE, [waiting(1, 3.0, 1.0)]) is IDLE
