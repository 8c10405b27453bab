"""Each policy against its own rule, said in another way."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.config import Policy as PolicyName
from halfmoon.proxy.conductor.placement import MemberState, PlacementRequest, Snapshot
from halfmoon.proxy.conductor.policies import POLICIES, CacheAware, LeastLoaded, RandomChoice, RoundRobin, create_policy

BLOCK_SIZE = 4


def workers(role: str, *tokens: int) -> tuple[MemberState, ...]:
    return tuple(MemberState(f"{role}-{n}", f"{role}-{n}.1", f"store-{n}", held) for n, held in enumerate(tokens))


def snapshot(prefill: tuple[int, ...], decode: tuple[int, ...]) -> Snapshot:
    return Snapshot.of(workers("prefill", *prefill), workers("decode", *decode), BLOCK_SIZE)


def test_the_configuration_knows_the_same_names() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)
    assert [create_policy(name, random.Random(0)).name for name in POLICIES] == list(POLICIES)
    with pytest.raises(ValueError, match="fastest"):
        create_policy("fastest", random.Random(0))


def test_random_draws_every_pair_equally_and_again_from_the_same_seed() -> None:
    cluster = snapshot((0, 900), (0, 0, 900))
    draws = [RandomChoice(random.Random(seed)).select(PlacementRequest(9), cluster) for seed in (3, 3)]
    assert draws[0] == draws[1]
    policy = RandomChoice(random.Random(1))
    pairs = Counter((choice.prefill.id, choice.decode.id) for choice in (policy.select(PlacementRequest(9), cluster) for _ in range(3000)))
    assert len(pairs) == 6 and min(pairs.values()) > 400 and max(pairs.values()) < 600


def test_round_robin_takes_turns_through_joins_and_deaths() -> None:
    policy, request = RoundRobin(), PlacementRequest(9)
    three = snapshot((0, 0, 0), (0, 0))
    turns = [policy.select(request, three) for _ in range(4)]
    assert [choice.prefill.id for choice in turns] == ["prefill-0", "prefill-1", "prefill-2", "prefill-0"]
    assert [choice.decode.id for choice in turns] == ["decode-0", "decode-1", "decode-0", "decode-1"]
    without_one = Snapshot.of((three.prefill[0], three.prefill[2]), three.decode, BLOCK_SIZE)
    assert [policy.select(request, without_one).prefill.id for _ in range(2)] == ["prefill-2", "prefill-0"]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_least_loaded_takes_the_fewest_outstanding_tokens(prefill: list[int], decode: list[int]) -> None:
    choice = LeastLoaded().select(PlacementRequest(9, {"store-0": 2}), snapshot(tuple(prefill), tuple(decode)))
    assert choice.prefill.num_outstanding_tokens == min(prefill)
    assert choice.decode.num_outstanding_tokens == min(decode)
    assert choice.prefix is None


@given(
    prefill=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    held=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    num_tokens=st.integers(1, 200),
)
@settings(max_examples=300)
def test_cache_aware_computes_the_last_token_soonest(prefill: list[int], held: list[int], num_tokens: int) -> None:
    cluster = snapshot(tuple(prefill), (5, 3, 4))
    held = [min(blocks, num_tokens // BLOCK_SIZE) for blocks in held]
    request = PlacementRequest(num_tokens, {f"store-{n}": blocks for n, blocks in enumerate(held) if blocks})
    choice = CacheAware().select(request, cluster)

    def finish(n: int) -> int:
        """Tokens computed on worker n until this request's first token, one by one."""
        done = prefill[n]
        for position in range(num_tokens):
            done += position >= held[n] * BLOCK_SIZE or position // BLOCK_SIZE == (num_tokens - 1) // BLOCK_SIZE
        return done

    chosen = int(choice.prefill.id.split("-")[1])
    assert finish(chosen) == min(finish(n) for n in range(len(prefill)))
    assert choice.decode.id == "decode-1"
    usable = (num_tokens - 1) // BLOCK_SIZE
    most = min(max(held), usable)
    if choice.prefix is None:
        assert most <= min(held[chosen], usable), "a longer prefix elsewhere goes unsaid"
    else:
        assert choice.prefix.num_blocks == most > held[chosen]
        assert held[int(choice.prefix.store_address.split("-")[1])] >= most


def test_cache_aware_leaves_a_hot_worker_when_waiting_costs_more_than_computing() -> None:
    request = PlacementRequest(100, {"store-0": 20})  # 80 of 100 tokens are held by worker 0's store
    assert CacheAware().select(request, snapshot((79, 0), (0,))).prefill.id == "prefill-0"
    moved = CacheAware().select(request, snapshot((81, 0), (0,)))
    assert moved.prefill.id == "prefill-1"
    assert moved.prefix is not None and moved.prefix == ("store-0", 20)
