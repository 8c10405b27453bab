"""Loading against computing, by tier: what is used, from where, and what is predicted for it."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.placement import MemberState, Placement, PlacementRequest, Snapshot
from halfmoon.proxy.conductor.policies import POLICIES, create_policy
from halfmoon.proxy.conductor.predictors import CostModel, Predictors

BLOCK_SIZE, NUM_TOKENS = 16, 1600
MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=1e-7, per_token_squared_s=1e-7, step_s=0.01, per_sequence_s=1e-4, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=10**5, cache_tokens=10**5, link_bytes_per_s=1e9, ssd_bytes_per_s=1e8,
)  # fmt: skip


def seen(num_workers: int = 2) -> Snapshot:
    prefill = [MemberState(f"prefill-{number}", f"p{number}.1", f"store-{number}", busy_until_s=0.0) for number in range(num_workers)]
    return Snapshot.of(prefill, [MemberState("decode-0", "d0.1", "store-9")], BLOCK_SIZE)


def place(policy: str, request: PlacementRequest, model: CostModel = MODEL, num_workers: int = 2) -> Placement:
    predictors = Predictors(model)
    answer = Conductor(create_policy(policy, random.Random(0), predictors), None, predictors).place(request, seen(num_workers))
    assert isinstance(answer, Placement)
    return answer


@given(
    num_held=st.integers(1, 100),
    num_ssd=st.integers(1, 100),
    num_tokens=st.integers(1600, 1700),
    ssd_bytes_per_s=st.floats(1e4, 1e9),
    own_s=st.floats(0.0, 1e-2),
)
def test_blocks_on_ssd_count_as_held_where_they_are_loaded_sooner_than_computed(
    num_held: int, num_ssd: int, num_tokens: int, ssd_bytes_per_s: float, own_s: float
) -> None:
    """own_s: of a block from the store's DRAM into the pages."""
    num_ssd = min(num_ssd, num_held)
    predictors = Predictors(dataclasses.replace(MODEL, ssd_bytes_per_s=ssd_bytes_per_s))
    predictors.transfer.own = lambda num_bytes: num_bytes / 16_000 * own_s  # type: ignore[method-assign]
    request = PlacementRequest(num_tokens, {"s": num_held, "t": 3}, ssd_blocks={"s": num_ssd})
    conductor = Conductor(create_policy("kvcache_centric", random.Random(0), predictors), None, predictors)
    found = conductor.weigh(request, BLOCK_SIZE)

    def compute_s(num_blocks: int) -> float:
        return MODEL.prefill_time(num_tokens - num_blocks * BLOCK_SIZE, num_blocks * BLOCK_SIZE)

    usable, warm = min(num_held, (num_tokens - 1) // BLOCK_SIZE), num_held - num_ssd
    num_read = usable - min(warm, usable)
    load_s = num_read * 16_000 / ssd_bytes_per_s + num_read * own_s
    loads = load_s <= compute_s(min(warm, usable)) - compute_s(usable)
    assert found.ssd_verdicts["s"].loads == loads
    expected = {"s": num_held if loads else warm, "t": 3}
    assert found.held_blocks == {store: num for store, num in expected.items() if num}
    assert found.ssd_blocks == ({"s": num_ssd} if loads else {})
    assert conductor.weigh(found, BLOCK_SIZE) == found, "once is enough"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_slow_disk_is_left_alone_whatever_the_policy(policy: str) -> None:
    request = PlacementRequest(NUM_TOKENS, {"store-0": 90}, ssd_blocks={"store-0": 60})
    fast, slow = place(policy, request, num_workers=1), place(policy, request, dataclasses.replace(MODEL, ssd_bytes_per_s=1e5), 1)
    assert fast.num_cached_tokens == 90 * BLOCK_SIZE and "60 blocks on SSD are loaded" in fast.reason
    assert slow.num_cached_tokens == 30 * BLOCK_SIZE and "60 blocks on SSD are computed" in slow.reason
    read_s = 60 * 16_000 / 1e8
    assert fast.ttft_s == pytest.approx(read_s + MODEL.prefill_time(160, 1440))
    assert slow.ttft_s == pytest.approx(MODEL.prefill_time(1120, 480))


@pytest.mark.parametrize("policy", ["cache_aware", "kvcache_centric", "adaptive"])
def test_another_nodes_prefix_is_fetched_where_that_is_faster_than_computing_it(policy: str) -> None:
    """Its load from SSD counts as well as its way over the network."""
    request = PlacementRequest(NUM_TOKENS, {"store-5": 90})
    on_ssd = dataclasses.replace(request, ssd_blocks={"store-5": 90})
    num_bytes = 90 * 16_000
    fetched = place(policy, request)
    assert fetched.prefix == ("store-5", 90) and fetched.num_cached_tokens == 1440
    assert fetched.ttft_s == pytest.approx(num_bytes / 1e9 + MODEL.prefill_time(160, 1440))
    assert place(policy, on_ssd).ttft_s == pytest.approx(num_bytes / 1e9 + num_bytes / 1e8 + MODEL.prefill_time(160, 1440))
    for slow in (dataclasses.replace(MODEL, link_bytes_per_s=1e5), dataclasses.replace(MODEL, ssd_bytes_per_s=1e5)):
        computed = place(policy, on_ssd, slow)
        assert computed.prefix is None and computed.num_cached_tokens == 0
        assert computed.ttft_s == pytest.approx(MODEL.prefill_time(NUM_TOKENS, 0))


@pytest.mark.parametrize("policy", ["kvcache_centric", "adaptive"])
def test_of_two_workers_the_one_that_reads_no_ssd_goes_first(policy: str) -> None:
    request = PlacementRequest(NUM_TOKENS, {"store-0": 90, "store-1": 90}, ssd_blocks={"store-0": 90})
    assert place(policy, request).prefill.id == "prefill-1"
    remote = PlacementRequest(NUM_TOKENS, {"store-7": 90, "store-8": 90}, ssd_blocks={"store-7": 90})
    assert place(policy, remote).prefix == ("store-8", 90)


def test_what_stands_in_pages_is_not_read_from_ssd() -> None:
    request = PlacementRequest(NUM_TOKENS, {"store-0": 90}, ssd_blocks={"store-0": 60}, page_blocks={"prefill-0": 50})
    assert place("kvcache_centric", request, num_workers=1).ttft_s == pytest.approx(40 * 16_000 / 1e8 + MODEL.prefill_time(160, 1440))


def test_each_stores_ssd_is_known_by_its_own_reads_and_a_new_one_by_the_others() -> None:
    predictors = Predictors(MODEL)
    assert predictors.ssd.predict(1e6, "new") == pytest.approx(1e6 / 1e8)
    for _ in range(30):
        predictors.ssd.observe(1e6, 0.02, "a")
        predictors.ssd.observe(1e6, 0.05, "b")
        predictors.ssd.observe(1e6, 0.021, "c")
    assert [predictors.ssd.predict(1e6, store) for store in "abc"] == pytest.approx([0.02, 0.05, 0.021], rel=0.02)
    assert predictors.ssd.predict(1e6, "new") == pytest.approx(0.021, rel=0.02)
    assert predictors.ssd.predict(0.0, "a") == 0.0
