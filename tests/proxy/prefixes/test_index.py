"""The index against one plain set of keys a store, and a plain list of promises."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.proxy.prefixes.promises import Promises

KEYS = [bytes([n]) * 16 for n in range(12)]
STORES = ["a:1", "b:2", "c:3"]
TTL_S = 10.0
some_keys = st.lists(st.sampled_from(KEYS), max_size=8, unique=True)
chains = st.builds(lambda name, length: [b"%d/%d" % (name, n) for n in range(length)], st.integers(0, 2), st.integers(1, 12))


def leading_run(held: set[bytes], wanted: list[bytes]) -> int:
    return next((n for n, key in enumerate(wanted) if key not in held), len(wanted))


@dataclasses.dataclass(eq=False)
class Promised:
    keys: list[bytes]  # as expected, and of those
    left: set[bytes]  # what the store did not hold then and has not announced since
    expires_s: float


class IndexMachine(RuleBasedStateMachine):
    """Any order of what Watch streams, placements and their ends tell."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.held: dict[str, set[bytes]] = {}
        self.promised: dict[str, list[Promised]] = {}

    @initialize(exact_blocks=st.sampled_from([12, 512]), part_blocks=st.sampled_from([2, 4096]))
    def make(self, exact_blocks: int, part_blocks: int) -> None:
        self.clears_at_once = part_blocks > len(KEYS)
        self.index = PrefixIndex(clock=lambda: self.now, promise_ttl_s=TTL_S, exact_blocks=exact_blocks, part_blocks=part_blocks)

    def know(self, store: str) -> None:
        self.held.setdefault(store, set())
        self.promised.setdefault(store, [])

    def confirm(self, store: str, keys: list[bytes]) -> None:
        for promise in self.promised[store]:
            promise.left -= set(keys)

    @rule(store=st.sampled_from(STORES), keys=some_keys)
    def replace(self, store: str, keys: list[bytes]) -> None:
        self.index.replace(store, keys)
        self.know(store)
        self.held[store] = set(keys)
        self.confirm(store, keys)

    @rule(store=st.sampled_from(STORES), stored=some_keys, evicted=some_keys)
    def change(self, store: str, stored: list[bytes], evicted: list[bytes]) -> None:
        self.index.change(store, stored, evicted)
        self.know(store)
        self.held[store] = (self.held[store] - set(evicted)) | set(stored)
        self.confirm(store, stored)

    @rule(store=st.sampled_from(STORES))
    def drop(self, store: str) -> None:
        self.index.drop(store)
        self.held.pop(store, None)
        self.promised.pop(store, None)

    @rule(store=st.sampled_from(STORES), keys=some_keys)
    def expect(self, store: str, keys: list[bytes]) -> None:
        self.index.expect(store, keys)
        if store in self.held:
            self.forget_old()
            new = keys[leading_run(self.held[store], keys) :]
            if new:
                self.promised[store].append(Promised(keys, set(new), self.now + TTL_S))

    @precondition(lambda self: any(self.promised.values()))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.forget_old()
        store = data.draw(st.sampled_from(sorted(self.promised)))
        if self.promised[store]:
            keys = data.draw(st.sampled_from(self.promised[store])).keys
            self.index.withdraw(store, keys)
            self.promised[store].remove([one for one in self.promised[store] if one.keys[-1] == keys[-1]][-1])

    @rule(store=st.sampled_from(STORES), keys=some_keys)
    def withdraw_what_may_not_be_promised(self, store: str, keys: list[bytes]) -> None:
        self.forget_old()
        found = [one for one in self.promised.get(store, []) if keys and one.keys[-1] == keys[-1]]
        if not found:
            self.index.leading_runs(KEYS)  # lets go of the old ones
            self.index.withdraw(store, keys)

    @rule(seconds=st.floats(0, TTL_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def forget_old(self) -> None:
        for found in self.promised.values():
            found[:] = [promise for promise in found if promise.expires_s > self.now]

    @invariant()
    def answers_are_those_of_plain_sets(self) -> None:
        self.forget_old()
        there = {store: held.union(*(one.left for one in self.promised[store])) for store, held in self.held.items()}
        for wanted in (KEYS, KEYS[3:], KEYS[::-1], [KEYS[5]]):
            expected = {store: leading_run(found, wanted) for store, found in there.items()}
            assert self.index.leading_runs(wanted) == {store: run for store, run in expected.items() if run}
            for stores in (STORES, STORES[1:]):
                assert self.index.num_held(wanted[0], stores) == sum(wanted[0] in there.get(store, ()) for store in stores)
        assert self.index.is_held(KEYS[0]) == any(KEYS[0] in held for held in self.held.values())
        if self.clears_at_once or not self.index._retired:
            assert len(self.index) == len(set().union(*self.held.values())), "a block that no store holds is forgotten"
            assert self.index.num_copies == sum(map(len, self.held.values()))
            assert self.index._live.bit_length() <= len(STORES) or not self.clears_at_once
        for key in KEYS[:3]:
            assert set(self.index.holders(key)) == {store for store, held in self.held.items() if key in held}
        promised = {key for found in self.promised.values() for one in found for key in one.left}
        assert set(self.index._promises.stores) == promised, "a promise that is over leaves nothing behind"


TestIndex: Any = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=25)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9), exact_blocks=st.integers(1, 45), num_wanted=st.integers(1, 40),
    promised=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=300)
def test_bisection_finds_the_ends_that_a_walk_finds(lengths: list[int], exact_blocks: int, num_wanted: int, promised: int) -> None:
    chain = [b"%d" % n for n in range(40)]
    index = PrefixIndex(exact_blocks=exact_blocks)
    for store, length in enumerate(lengths):
        index.replace(f"s{store}", chain[:length])
    index.expect("s0", chain[:promised])
    lengths[0] = max(lengths[0], promised)
    expected = {f"s{store}": min(length, num_wanted) for store, length in enumerate(lengths) if length}
    assert index.leading_runs(chain[:num_wanted]) == expected


def test_what_a_dropped_store_held_leaves_in_parts_and_is_never_answered() -> None:
    index = PrefixIndex(part_blocks=2)
    index.replace("a:1", KEYS)
    index.replace("b:2", KEYS[:3])
    index.drop("a:1")
    assert index.leading_runs(KEYS) == {"b:2": 3} and index.holders(KEYS[5]) == []
    index.replace("a:1", KEYS[:1])
    assert index.leading_runs(KEYS) == {"a:1": 1, "b:2": 3}
    for _ in KEYS:
        index.change("b:2", (), ())
    assert len(index) == 3 and index.num_copies == 4 and not index._retired
    index.replace("c:3", ())
    assert index._slots["c:3"] == 0, "the number is free again"


def test_stores_that_come_and_go_do_not_widen_the_index() -> None:
    index = PrefixIndex()
    for n in range(100):
        index.replace(f"store:{n}", KEYS)
        index.drop(f"store:{n}")
    index.replace("last:1", KEYS)
    assert index._holders[KEYS[0]] == 1
    assert index.leading_runs(KEYS) == {"last:1": len(KEYS)}
    assert index.leading_runs([]) == {}


@given(st.lists(st.tuples(st.sampled_from(STORES), chains, st.booleans()), max_size=20), st.integers(1, 30))
@settings(max_examples=200)
def test_a_full_index_knows_leading_runs_and_never_more_than_its_bound(changes: list[tuple[str, list[bytes], bool]], bound: int) -> None:
    index = PrefixIndex(max_copies=bound)
    held: dict[str, dict[bytes, None]] = {store: {} for store in STORES}
    for store, chain, evicts in changes:
        if evicts:
            gone = [key for key in chain[len(chain) // 2 :] if key in held[store]]
            gone += [key for key in held[store] if key.split(b"/")[0] == chain[0].split(b"/")[0] and key not in chain]
            held[store] = {key: None for key in held[store] if key not in gone}
            index.change(store, (), gone)
        else:
            held[store] |= dict.fromkeys(chain)
            index.change(store, chain, ())
        assert index.num_copies <= bound
        for known, slot in index._slots.items():
            assert index._held[slot] <= held[known].keys()
            assert index.is_cut(known) or index._held[slot] == held[known].keys()
            for name in range(3):
                depths = [b"%d/%d" % (name, n) in index._held[slot] for n in range(12)]
                assert depths == sorted(depths, reverse=True), "what is known of a chain starts at its start"
    for store in STORES:
        index.replace(store, ())
    index.replace("b:2", list(held["b:2"])[:bound])
    assert not index.is_cut("b:2") and index.has_room() == (index.num_copies <= 0.9 * bound)


def test_too_many_promises_push_out_the_oldest() -> None:
    promises = Promises(lambda: 0.0, max_blocks=10)
    for name in range(5):
        promises.add(0, [b"%d/%d" % (name, n) for n in range(4)])
    assert set(promises.stores) == {b"%d/%d" % (name, n) for name in (3, 4) for n in range(4)}


def test_a_promise_to_a_store_that_nothing_is_known_of_is_not_noted() -> None:
    index = PrefixIndex()
    index.expect("a:1", KEYS)
    index.withdraw("a:1", KEYS)
    assert index.leading_runs(KEYS) == {} and not index._slots


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_few_holders_and_many_are_named_alike_through_stores_that_leave(holders: set[int], left: set[int]) -> None:
    index = PrefixIndex()
    for number in range(61):
        index.change(f"s{number}", [b"k"] if number in holders else [], ())
    assert set(index.holders(b"k")) == {f"s{number}" for number in holders}
    for number in left:
        index.drop(f"s{number}")
    assert set(index.leading_runs([b"k"])) == set(index.holders(b"k")) == {f"s{number}" for number in holders - left}
    index.change("late", [b"k"], ())
    assert set(index.holders(b"k")) == {f"s{number}" for number in holders - left} | {"late"}
