from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.kvstore.content import ContentIndex
from halfmoon.kvstore.eviction import EVICTION_POLICIES, LFU, LRU, Cost, LengthAware, create_eviction_policy
from halfmoon.kvstore.slots import SlotAllocator
from halfmoon.protocol.errors import ConfigError


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "evict"]), st.integers(0, 5))))
def test_lru_evicts_what_was_added_longest_ago(steps: list[tuple[str, int]]) -> None:
    policy, expected = LRU(), []
    for step, key in steps:
        if step == "add":
            expected = [found for found in expected if found != key] + [key]
            policy.add(key)
        elif step == "remove" and key in expected:
            expected.remove(key)
            policy.remove(key)
        elif step == "evict" and expected:
            assert policy.evict() == expected.pop(0)
        elif step != "add":
            with pytest.raises(KeyError):
                policy.remove(key) if step == "remove" else policy.evict()
        assert len(policy) == len(expected)


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove", "evict", "forget"]), st.integers(0, 5), st.integers(0, 3))))
def test_lfu_and_length_aware_evict_the_least_of_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    for policy, by_position in ((LFU(), False), (LengthAware(), True)):
        uses: dict[int, int] = {}
        evictable: dict[int, tuple[int, int, int]] = {}
        for turn, (step, key, position) in enumerate(steps):
            if step == "add":
                uses[key] = uses.get(key, 0) + 1
                evictable[key] = (uses[key], -position if by_position else 0, turn)
                policy.add(key, position, 4)
            elif step == "remove" and key in evictable:
                del evictable[key]
                policy.remove(key)
            elif step == "forget" and key not in evictable:
                uses.pop(key, None)
                policy.forget(key)
            elif step == "evict" and evictable:
                least = min(evictable, key=lambda key: evictable[key])
                assert policy.evict() == least
                del evictable[least], uses[least]
            assert len(policy) == len(evictable)


def test_cost_gives_up_short_runs_first_and_old_worth_in_the_end() -> None:
    policy = Cost(block_tokens=6_000)
    policy.add("long", 0, 20)
    policy.add("short", 0, 1)
    assert policy.evict() == "short"
    for turn in range(10):
        policy.add(f"once {turn}", 0, 1)
        if (evicted := policy.evict()) == "long":
            return
        assert evicted == f"once {turn}"
    raise AssertionError("a block of long ago stays for ever")


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@given(
    uses=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=30),
    num_slots=st.integers(6, 10),
)
@settings(max_examples=60)
def test_the_end_of_a_chain_goes_before_its_start(name: str, uses: list[tuple[str, int]], num_slots: int) -> None:
    slots = SlotAllocator(num_slots)
    content = ContentIndex(slots, create_eviction_policy(name), lambda stored, evicted: None)
    for chain, length in uses:
        keys = [f"{chain}{index}".encode() for index in range(length)]
        found = content.find_run(keys)
        content.pin(found)
        fresh = content.allocate(length - len(found))
        assert fresh is not None
        content.add((key, slot, 0) for key, slot in zip(keys[len(found) :], fresh, strict=True))
        content.unpin([*found, *fresh])
        for other in "abc":
            held = [content.slot(f"{other}{index}".encode()) is not None for index in range(6)]
            assert held == sorted(held, reverse=True), f"chain {other} has a hole: {held}"


def test_stale_entries_do_not_pile_up() -> None:
    policy = LFU()
    for _ in range(10_000):
        policy.add("a")
        policy.add("b")
    assert len(policy._heap) <= 2 * 2 + 64


def test_an_unknown_policy_is_refused_by_name() -> None:
    assert isinstance(create_eviction_policy("lru"), LRU)
    with pytest.raises(ConfigError, match="'fifo'; it must be one of 'lru', 'lfu', 'length_aware', 'cost'"):
        create_eviction_policy("fifo")
