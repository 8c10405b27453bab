from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.timing.chunk_sizer import LEAST_CHUNK_TOKENS, ChunkSizer
from halfmoon.protocol.timing.step_cost import ChunkWork, StepCost, StepWork, attention_of
from halfmoon.proxy.conductor.member_state import MemberState
from halfmoon.proxy.conductor.placement import PlacementRequest, Slo, Snapshot
from halfmoon.proxy.conductor.policies.adaptive import MOST_FORMS, Adaptive
from halfmoon.proxy.conductor.policies.base import rebalance
from halfmoon.proxy.conductor.pool import Pool
from halfmoon.proxy.conductor.predictors import CostModel, Predictors
from halfmoon.proxy.conductor.predictors.waiting import slowdowns_beside

MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.02, per_sequence_s=1e-3, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=100_000, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip
SLO = Slo(5.0, 0.1)


def member(number: int, role: str, *, busy: float = 0.0, running: int = 0, tokens: int = 0) -> MemberState:
    name = f"n{number}"
    return MemberState(
        name, name, name, num_outstanding_tokens=tokens, kv_capacity_tokens=100_000, busy_until_s=busy, num_requests=running,
        num_running=running, num_running_tokens=tokens, role=role,
    )  # fmt: skip


def everyone(*members: MemberState, now_s: float = 0.0) -> Snapshot:
    return Snapshot.of(members, members, 64, now_s=now_s)


def test_a_free_prefill_worker_takes_the_prompt_and_the_decode_role_the_tokens() -> None:
    choice = Adaptive(Predictors(MODEL), SLO).select(
        PlacementRequest(1000), everyone(member(0, "prefill"), member(1, "decode", running=30))
    )
    assert (choice.prefill.id, choice.decode.id) == ("n0", "n1")
    assert choice.ttft_s == pytest.approx(1.0)


def test_a_decode_worker_with_slack_prefills_for_itself_where_the_queues_are_longer() -> None:
    # 0.96 of 100 ms is the target; 12 of the batch's 32 ms are its own, the other 20 the read that a chunk of 84 tokens hides: 96 for 84
    cluster = everyone(member(0, "prefill", busy=9.0), member(1, "decode", running=12))
    choice = Adaptive(Predictors(MODEL), SLO).select(PlacementRequest(1000), cluster)
    assert choice.prefill is choice.decode and choice.prefill.id == "n1"
    assert choice.ttft_s == pytest.approx(96 / 84, rel=1e-3)


def test_a_decode_worker_whose_steps_or_pages_are_full_does_not_prefill() -> None:
    for full in (member(1, "decode", running=60), member(1, "decode", running=5, tokens=95_000)):
        choice = Adaptive(Predictors(MODEL), SLO).select(PlacementRequest(1000), everyone(member(0, "prefill", busy=9.0), full))
        assert choice.prefill.id == "n0"


def test_the_longest_prefix_anywhere_is_used() -> None:
    cluster = everyone(member(0, "prefill", busy=2.0), member(1, "prefill"), member(2, "decode", running=40))
    choice = Adaptive(Predictors(MODEL), SLO).select(PlacementRequest(1000, {"n0": 10, "n1": 2}), cluster)
    assert choice.prefill.id == "n1"
    assert choice.prefix is not None and choice.prefix.store_address == "n0" and choice.prefix.num_blocks == 10


def placed(policy: Adaptive, num: int, *, num_tokens: int, gap_s: float, cluster: tuple[MemberState, ...], answer_len: int) -> float:
    """num requests, one every gap_s, and as many ends. Returns the moment after the last."""
    for number in range(num):
        policy.observe_arrival(PlacementRequest(num_tokens), everyone(*cluster, now_s=number * gap_s))
        policy.observe_end(answer_len)
    return num * gap_s


def test_before_anything_is_known_everybody_does_both() -> None:
    changes = rebalance(Adaptive(Predictors(MODEL), SLO), everyone(member(0, "prefill"), member(1, "prefill"), member(2, "decode")))
    assert {change.member_id: change.role for change in changes} == {"n0": "decode", "n1": "decode"}


def test_where_prompts_beside_answers_would_be_late_some_workers_prefill_alone() -> None:
    # a batch of 60 leaves 12 of 92 ms for a prompt beside it; alone, 400 tokens take 0.4 s of the 0.5 s that there are
    policy = Adaptive(Predictors(MODEL), Slo(0.5, 0.1))
    cluster = tuple(member(number, "decode", running=40 if number else 0, tokens=4000) for number in range(4))
    now_s = placed(policy, 40, num_tokens=400, gap_s=1.0, cluster=cluster, answer_len=1500)
    changes = rebalance(policy, everyone(*cluster, now_s=now_s))
    assert [(change.member_id, change.role) for change in changes] == [("n0", "prefill")], "the one with the fewest sequences"


def test_where_answers_are_all_the_work_nobody_prefills_alone() -> None:
    policy = Adaptive(Predictors(MODEL), Slo(5.0, 0.1))
    cluster = (member(0, "prefill"), member(1, "decode", running=70))
    now_s = placed(policy, 40, num_tokens=20, gap_s=0.5, cluster=cluster, answer_len=1000)
    assert [(change.member_id, change.role) for change in rebalance(policy, everyone(*cluster, now_s=now_s))] == [("n0", "decode")]


def test_a_change_waits_until_the_last_one_is_a_while_ago() -> None:
    policy = Adaptive(Predictors(MODEL), SLO, calm_s=4.0)
    assert rebalance(policy, everyone(member(0, "prefill"), member(1, "decode")))
    again = everyone(member(0, "prefill"), member(1, "decode", running=70))
    placed(policy, 20, num_tokens=20, gap_s=0.1, cluster=tuple(again.decode), answer_len=1000)
    assert rebalance(policy, dataclasses.replace(again, now_s=3.9)) == ()
    assert rebalance(policy, dataclasses.replace(again, now_s=4.1))


def test_where_nobody_decodes_somebody_does_at_once() -> None:
    policy = Adaptive(Predictors(MODEL), SLO)
    assert rebalance(policy, everyone(member(0, "prefill"), member(1, "decode")))
    left = everyone(member(0, "prefill", busy=9.0), member(1, "prefill", busy=0.5), now_s=0.1)
    (change,) = rebalance(policy, left)
    assert (change.member_id, change.role, change.cause) == ("n1", "decode", "missing_role"), "the one with the shortest queue"


def test_where_workers_that_decode_may_not_prefill_somebody_always_does() -> None:
    policy = Adaptive(Predictors(MODEL), Slo(5.0, 0.1), local_prefill=False)
    cluster = (member(0, "decode"), member(1, "decode", running=70))
    (change,) = rebalance(policy, everyone(*cluster))
    assert (change.member_id, change.role) == ("n0", "prefill")
    now_s = placed(policy, 40, num_tokens=20, gap_s=0.5, cluster=cluster, answer_len=1000)
    assert rebalance(policy, everyone(member(0, "prefill"), member(1, "decode", running=70), now_s=now_s)) == ()


def test_a_worker_that_can_t_change_is_passed_over() -> None:
    policy = Adaptive(Predictors(MODEL), SLO)
    cluster = everyone(member(0, "prefill"), member(1, "prefill"), member(2, "decode"))
    thinking = policy.deliberate(cluster, frozenset({"n0"}))
    with pytest.raises(StopIteration) as decided:
        next(thinking)
    assert [change.member_id for change in decided.value.value] == ["n1"]
    again = Adaptive(Predictors(MODEL), SLO)
    with pytest.raises(StopIteration) as decided:
        next(again.deliberate(cluster, frozenset({"n0", "n1"})))
    assert decided.value.value == () and len(rebalance(again, cluster)) == 2, "and no calm begins"


def test_an_arrival_counts_its_tokens_that_nobody_has_cached() -> None:
    policy = Adaptive(Predictors(MODEL), SLO)
    policy.observe_arrival(PlacementRequest(1000, {"n0": 3}, page_blocks={"n1": 10}), everyone(member(0, "decode"), now_s=7.0))
    ((at_s, num_new, num_prefix),) = policy.arrivals
    assert (at_s, num_new, num_prefix) == (7.0, 1000 - 640, 640)


def test_a_deliberation_over_a_thousand_workers_is_short_and_comes_in_pieces() -> None:
    policy = Adaptive(Predictors(MODEL), SLO)
    cluster = tuple(member(number, "decode", running=20, tokens=4000) for number in range(1000))
    now_s = placed(policy, 40, num_tokens=400, gap_s=1.0, cluster=cluster[:1], answer_len=1500)
    assert MOST_FORMS <= len(list(policy.deliberate(everyone(*cluster, now_s=now_s)))) <= MOST_FORMS + 5


@settings(max_examples=200)
@given(
    roles=st.lists(st.sampled_from(["prefill", "decode"]), min_size=1, max_size=12),
    loads=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 100_000), st.floats(0, 50)), min_size=12, max_size=12),
    tpot_s=st.sampled_from([0.015, 0.05, 0.1, float("inf")]),
)
def test_whatever_the_load_somebody_prefills_somebody_decodes_and_every_request_has_a_place(
    roles: list[str], loads: list[tuple[int, int, float]], tpot_s: float
) -> None:
    members = [member(at, role, running=loads[at][0], tokens=loads[at][1], busy=loads[at][2]) for at, role in enumerate(roles)]
    policy = Adaptive(Predictors(MODEL), Slo(5.0, tpot_s))
    cluster = everyone(*members, now_s=100.0)
    choice = policy.select(PlacementRequest(500), cluster)
    assert choice.prefill in members and choice.decode in members
    changed = {change.member_id: change.role for change in rebalance(policy, cluster)}
    after = [changed.get(one.id, one.role) for one in members]
    assert "decode" in after


@given(running=st.integers(1, 200), each=st.integers(10, 20_000), target_s=st.floats(0.01, 0.2), prefix=st.integers(0, 30_000))
def test_a_local_prefill_is_slowed_by_the_chunks_that_the_worker_will_run(running: int, each: int, target_s: float, prefix: int) -> None:
    """ChunkSizer's own choice rounds down to 64, so the judgement lies between that size and the next."""
    cost = StepCost(5e-3, 2e-3, 2e-5, 1e-9, 1e-5, 4e-8)
    state = MemberState("d", "d#1", "d", num_running=running, num_running_tokens=running * each, role="decode")
    pool = Pool.of([state])
    found = float(slowdowns_beside(cost, pool.num_running, pool.num_running_tokens, target_s, prefix, 2048)[0])
    decodes = StepWork(num_decodes=running, num_context_tokens=running * each)
    sizer = ChunkSizer(most=2048, most_beside=2048, least=LEAST_CHUNK_TOKENS)
    size = sizer.num_tokens(cost, decodes, target_s, [ChunkWork(prefix, 100_000)])

    def slowdown(num_tokens: int) -> float:
        work = StepWork(num_tokens, attention_of(num_tokens, prefix))
        alone_s = cost.chunk_s + num_tokens * cost.per_token_s + work.attention * cost.per_attention_s
        return cost.seconds(work._replace(num_decodes=running, num_context_tokens=running * each)) / alone_s

    assert slowdown(min(size + 64, 2048)) * (1 - 1e-6) <= found <= slowdown(size) * (1 + 1e-6)
