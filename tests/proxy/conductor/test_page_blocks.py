"""What stands in a worker's pages, in policies and predictions: as cached as in its store, and nothing to load."""

from __future__ import annotations

import random

import numpy as np
import pytest

from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.forecast import prefill_forecast
from halfmoon.proxy.conductor.placement import MemberState, Placement, PlacementRequest, Snapshot
from halfmoon.proxy.conductor.policies import create_policy
from halfmoon.proxy.conductor.predictors.timing import Predictors

BLOCK_SIZE = 64
NUM_TOKENS = 6400


def workers(role: str, number: int) -> list[MemberState]:
    return [MemberState(f"{role}-{n}", f"{role}-{n}.1", f"store-{n}") for n in range(number)]


def cluster() -> Snapshot:
    return Snapshot.of(workers("prefill", 3), workers("decode", 2), BLOCK_SIZE)


def place(policy: str, request: PlacementRequest, predictors: Predictors) -> Placement:
    placed = Conductor(create_policy(policy, random.Random(0), predictors), predictors=predictors).place(request, cluster())
    assert isinstance(placed, Placement)
    return placed


@pytest.fixture
def predictors() -> Predictors:
    """Loads from a worker's own store have been seen, and take their time."""
    found = Predictors.guess()
    for num_blocks in (10, 40, 90):
        found.transfer.observe(num_blocks * BLOCK_SIZE * found.model.kv_bytes_per_token, 0.002 * num_blocks, "shm")
    return found


@pytest.mark.parametrize("policy", ["cache_aware", "kvcache_centric", "adaptive"])
def test_the_worker_whose_pages_hold_the_prefix_goes_before_one_whose_store_does(policy: str, predictors: Predictors) -> None:
    request = PlacementRequest(NUM_TOKENS, {"store-0": 80, "store-2": 80}, page_blocks={"prefill-2": 80})
    placed = place(policy, request, predictors)
    assert placed.prefill.id == "prefill-2" and placed.prefix is None and placed.num_cached_tokens == 80 * BLOCK_SIZE


@pytest.mark.parametrize("policy", ["cache_aware", "kvcache_centric", "adaptive"])
def test_pages_may_hold_more_than_any_store(policy: str, predictors: Predictors) -> None:
    request = PlacementRequest(NUM_TOKENS, {"store-0": 10}, page_blocks={"prefill-1": 95})
    placed = place(policy, request, predictors)
    assert placed.prefill.id == "prefill-1" and placed.prefix is None and placed.num_cached_tokens == 95 * BLOCK_SIZE


def test_a_prompt_that_is_known_to_its_end_has_a_block_to_compute(predictors: Predictors) -> None:
    request = PlacementRequest(NUM_TOKENS, page_blocks={"prefill-1": 100})
    assert place("kvcache_centric", request, predictors).num_cached_tokens == NUM_TOKENS - BLOCK_SIZE


def test_what_stands_in_pages_is_predicted_without_a_load(predictors: Predictors) -> None:
    member, seen = cluster().prefill[1], cluster()
    requests = [
        PlacementRequest(NUM_TOKENS, {"store-1": 80}),
        PlacementRequest(NUM_TOKENS, {"store-1": 80}, page_blocks={"prefill-1": 50}),
        PlacementRequest(NUM_TOKENS, {"store-1": 80}, page_blocks={"prefill-1": 80}),
    ]
    parts = [prefill_forecast(predictors, request, member, None, seen) for request in requests]
    block_bytes = BLOCK_SIZE * predictors.model.kv_bytes_per_token
    assert [part.transfer_s for part in parts] == [predictors.transfer.own(blocks * block_bytes) for blocks in (80, 30, 0)]
    assert parts[0].transfer_s > parts[1].transfer_s > parts[2].transfer_s == 0.0
    assert len({part.prefill_s for part in parts}) == 1, "they compute the same"
    for policy in ("kvcache_centric", "adaptive"):
        placed = place(policy, requests[2], predictors)
        assert placed.ttft_s is not None and placed.prefill.id == "prefill-1"


def test_a_pool_knows_both_whoever_is_left_out_or_joined() -> None:
    pool = cluster().prefill.with_held({"store-0": 3, "store-1": 7}, {"prefill-1": 5, "prefill-2": 2})
    assert pool.held({}).tolist() == [3, 7, 2] and pool.in_pages({}).tolist() == [0, 5, 2]
    part = pool.take(np.array([2, 1]))
    assert (part.held({}).tolist(), part.in_pages({}).tolist()) == ([2, 7], [2, 5])
    assert pool.join(part).in_pages({}).tolist() == [0, 5, 2, 2, 5]
