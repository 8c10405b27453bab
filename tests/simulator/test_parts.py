"""Clock, links and caches of the simulated cluster."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.simulator.clock import EventLoop
from halfmoon.simulator.links import Link, send
from halfmoon.simulator.node_cache import NodeCache


def key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def test_events_run_by_moment_and_equal_moments_in_the_order_asked_for() -> None:
    loop, seen = EventLoop(), []
    for moment, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        loop.at(moment, seen.append, name)
    loop.at(1.5, lambda: loop.at(1.5, seen.append, "at once"))
    loop.run()
    assert seen == ["a", "b", "at once", "c"] and loop.now == 2.0
    with pytest.raises(ValueError, match="stands at 2"):
        loop.at(1.0, seen.append, "late")


def test_layers_travel_under_the_computation_and_the_last_one_after_it() -> None:
    source, target = Link(100.0), Link(100.0)
    assert send(source, target, 200, 0.0, 10.0, num_layers=4) == pytest.approx(10.5)
    assert send(source, target, 2000, 10.0, 20.0, num_layers=4) == pytest.approx(30.0), "the link is slower than the computation"


def test_two_senders_to_one_target_share_its_link() -> None:
    one, other, target = Link(100.0), Link(100.0), Link(100.0)
    assert send(one, target, 1000, 0.0, 0.0) == pytest.approx(10.0)
    assert send(other, target, 1000, 0.0, 0.0) == pytest.approx(20.0)
    assert one.num_bytes == other.num_bytes == 1000 and target.num_bytes == 2000


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=20), seconds=st.floats(0, 10))
def test_a_link_is_never_faster_than_its_bandwidth(sizes: list[int], seconds: float) -> None:
    source, target = Link(1e5), Link(1e5)
    last = max(send(source, target, size, 0.0, seconds, num_layers=8) for size in sizes)
    assert last >= sum(sizes) / 1e5 - 1e-6
    assert last >= seconds


def test_a_prompt_is_cached_found_again_and_evicted_from_its_end() -> None:
    changes: list[tuple[list[bytes], list[bytes]]] = []
    cache = NodeCache(4, lambda stored, evicted, *_: changes.append((stored, evicted)))
    chain = [key(number) for number in range(3)]
    cache.insert(chain)
    run = cache.acquire([*chain, key(9)])
    assert len(run.slots) == 3 and run.num_ssd == 0
    cache.release(run)
    cache.insert([key(7), key(8)])
    assert changes[-2:] == [([], [key(2)]), ([key(7), key(8)], [])]
    assert len(cache.acquire(chain).slots) == 2


def test_what_is_pinned_is_not_evicted_and_what_has_no_room_is_left_out() -> None:
    cache = NodeCache(3, lambda *_: None)
    cache.insert([key(0), key(1)])
    cache.acquire([key(0), key(1)])
    cache.insert([key(5), key(6), key(7)])
    assert len(cache.acquire([key(0), key(1)]).slots) == 2
    assert len(cache.acquire([key(5), key(6)]).slots) == 1


def test_room_for_the_end_of_a_chain_is_never_made_by_evicting_its_start() -> None:
    cache = NodeCache(3, lambda *_: None)
    cache.insert([key(0), key(1)])
    cache.insert([key(number) for number in range(5)])
    assert len(cache.acquire([key(number) for number in range(5)]).slots) == 3


def test_evicted_blocks_go_to_the_ssd_and_are_found_there_until_it_is_full() -> None:
    held: set[bytes] = set()

    def change(stored: list[bytes], evicted: list[bytes], *_: list[bytes]) -> None:
        held.difference_update(evicted)
        held.update(stored)

    cache = NodeCache(2, change, num_ssd_blocks=2)
    for number in range(6):
        cache.insert([key(number)])
    assert held == {key(number) for number in (2, 3, 4, 5)}
    run = cache.acquire([key(3)])
    assert run.num_ssd == 1 and not run.slots


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), max_size=30), st.integers(1, 8), st.integers(0, 6))
def test_what_others_are_told_of_a_node_is_what_it_holds(chains: list[list[int]], num_blocks: int, num_ssd: int) -> None:
    held: set[bytes] = set()
    on_ssd: set[bytes] = set()

    def change(stored: list[bytes], evicted: list[bytes], demoted: list[bytes], promoted: list[bytes]) -> None:
        held.difference_update(evicted)
        held.update(stored)
        on_ssd.difference_update(evicted, promoted)
        on_ssd.update(demoted)

    cache = NodeCache(num_blocks, change, num_ssd_blocks=num_ssd)
    for chain in chains:
        cache.insert([key(number) for number in chain])
        assert held == {*cache.dram.keys(), *cache.ssd.keys()}
        assert on_ssd == held - set(cache.dram.keys())
        slots = cache.dram_slots
        assert slots.num_leased == 0 and slots.num_cached + slots.num_free == num_blocks


def test_every_count_of_equal_moments_is_kept() -> None:
    loop, seen = EventLoop(), []
    for number in range(50):
        loop.at(1.0, seen.append, number)
    loop.run()
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
