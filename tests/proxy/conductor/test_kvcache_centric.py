"""Algorithm 1 against a second transcription of it, line by line from the paper."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.proxy.conductor.placement import MemberState, PlacementRequest, Snapshot
from halfmoon.proxy.conductor.policies.kvcache_centric import KvcacheCentric
from halfmoon.proxy.conductor.predictors import CostModel, Predictors

BLOCK = 64
MODEL = CostModel(
    per_token_s=1e-4, per_token_prefix_s=2e-9, per_token_squared_s=1e-9, step_s=0.02, per_sequence_s=1e-4, per_kv_token_s=1e-7,
    kv_bytes_per_token=100_000, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=2e9,
)  # fmt: skip


def algorithm_1(instances: list[dict[str, Any]], num_tokens: int, now: float, threshold: float) -> tuple[float, str, bool]:
    """FAST'25, page 8, lines 2 to 15 and 20, with prefix_len = 0 as an infinite ratio. (TTFT, p, whether the cache is transferred)."""
    most = (num_tokens - 1) // BLOCK * BLOCK  # the last token is always computed
    prefix = {one["id"]: min(one["held"] * BLOCK, most) for one in instances}
    best_len = max(prefix.values())  # line 3
    ttft, p = math.inf, ""  # line 2
    for one in instances:  # line 4
        own = prefix[one["id"]]
        ratio = best_len / own if own else (math.inf if best_len else 1.0)
        if ratio > threshold:  # line 5
            prefix_len = best_len
            t_transfer = (best_len - own) * MODEL.kv_bytes_per_token / MODEL.link_bytes_per_s
        else:
            prefix_len, t_transfer = own, 0.0
        t_queue = max(one["busy_until_s"] - now, 0.0)  # line 12
        new = num_tokens - prefix_len
        t_prefill = new * MODEL.per_token_s + new * prefix_len * MODEL.per_token_prefix_s + new**2 * MODEL.per_token_squared_s  # line 13
        if ttft > t_transfer + t_queue + t_prefill:  # line 14
            ttft, p = t_transfer + t_queue + t_prefill, one["id"]  # line 15
    own = prefix[p]
    transfers = best_len > own and (best_len / own if own else math.inf) > threshold  # line 20
    return ttft, p, transfers


instances = st.lists(
    st.fixed_dictionaries({"held": st.integers(0, 40), "busy_until_s": st.floats(0, 20, allow_nan=False)}), min_size=1, max_size=8
)


@settings(max_examples=300)
@given(
    drawn=instances,
    num_tokens=st.integers(1, 4000),
    now=st.floats(0, 20, allow_nan=False),
    threshold=st.sampled_from([1.0, 1.5, 3.0, math.inf]),
)
def test_it_chooses_what_a_literal_transcription_of_algorithm_1_chooses(
    drawn: list[dict[str, Any]], num_tokens: int, now: float, threshold: float
) -> None:
    found = [one | {"id": f"p{number}"} for number, one in enumerate(drawn)]
    members = tuple(MemberState(one["id"], one["id"], f"store-{one['id']}", busy_until_s=one["busy_until_s"]) for one in found)
    held = {f"store-{one['id']}": one["held"] for one in found if one["held"]}
    decode = (MemberState("d0", "d0", "store-d0"),)
    choice = KvcacheCentric(Predictors(MODEL), threshold).select(
        PlacementRequest(num_tokens, held), Snapshot.of(members, decode, BLOCK, now_s=now)
    )
    ttft, p, transfers = algorithm_1(found, num_tokens, now, threshold)
    assert choice.ttft_s is not None and math.isclose(choice.ttft_s, ttft, rel_tol=1e-9, abs_tol=1e-9)
    # instances whose sums differ in the last bit only may change places
    if choice.prefill.id == p:
        assert (choice.prefix is not None) == transfers
    else:
        index = [one["id"] for one in found].index(choice.prefill.id)
        alone, _, _ = algorithm_1([{**found[index], "held": found[index]["held"]}], num_tokens, now, threshold)
        assert alone >= ttft - 1e-9


def test_the_threshold_decides_between_a_transfer_and_the_own_prefix() -> None:
    members = (MemberState("p0", "p0", "s0", busy_until_s=100.0), MemberState("p1", "p1", "s1", busy_until_s=0.0))
    cluster = Snapshot.of(members, (MemberState("d0", "d0", "s2"),), BLOCK)
    request = PlacementRequest(2000, {"s0": 30, "s1": 20})
    fetches = KvcacheCentric(Predictors(MODEL), 1.4).select(request, cluster)
    stays = KvcacheCentric(Predictors(MODEL), 1.6).select(request, cluster)
    assert fetches.prefill.id == stays.prefill.id == "p1"
    assert fetches.prefix is not None and fetches.prefix.store_address == "s0" and fetches.prefix.num_blocks == 30
    assert stays.prefix is None


def test_the_decode_worker_with_the_least_predicted_step_is_chosen_promises_included() -> None:
    decode = (
        MemberState("d0", "d0", "s1", num_outstanding_tokens=50_000, num_requests=3, num_running=1, num_running_tokens=1000),
        MemberState("d1", "d1", "s2", num_outstanding_tokens=40_000, num_requests=4, num_running=4, num_running_tokens=40_000),
    )
    choice = KvcacheCentric(Predictors(MODEL)).select(PlacementRequest(100), Snapshot.of((MemberState("p0", "p0", "s0"),), decode, BLOCK))
    assert choice.decode.id == "d1"
    assert choice.tpot_s is not None and math.isclose(choice.tpot_s, 0.02 + 5 * 1e-4 + 40_100 * 1e-7)
