"""The index against one plain set of keys a store."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.proxy.prefix_index import PrefixIndex

KEYS = [bytes([n]) * 16 for n in range(12)]
STORES = ["a:1", "b:2", "c:3"]
keys = st.lists(st.sampled_from(KEYS), max_size=8, unique=True)
steps = st.lists(st.tuples(st.sampled_from(["replace", "change", "drop"]), st.sampled_from(STORES), keys, keys), max_size=20)


def leading_run(held: set[bytes], wanted: list[bytes]) -> int:
    return next((n for n, key in enumerate(wanted) if key not in held), len(wanted))


@given(steps, keys)
@settings(max_examples=300)
def test_runs_are_those_of_the_stores_own_sets(steps: list[tuple[str, str, list[bytes], list[bytes]]], wanted: list[bytes]) -> None:
    index = PrefixIndex()
    held: dict[str, set[bytes]] = {store: set() for store in STORES}
    for action, store, some, others in steps:
        if action == "replace":
            index.replace(store, some)
            held[store] = set(some)
        elif action == "change":
            index.change(store, some, others)
            held[store] = (held[store] - set(others)) | set(some)
        else:
            index.drop(store)
            held[store] = set()
    expected = {store: leading_run(found, wanted) for store, found in held.items()}
    assert index.leading_runs(wanted) == {store: run for store, run in expected.items() if run}
    assert len(index) == len(set().union(*held.values())), "a block that no store holds is forgotten"


def test_stores_that_come_and_go_do_not_widen_the_index() -> None:
    index = PrefixIndex()
    for n in range(100):
        index.replace(f"store:{n}", KEYS)
        index.drop(f"store:{n}")
    index.replace("last:1", KEYS)
    assert index._holders[KEYS[0]] == 1
    assert index.leading_runs(KEYS) == {"last:1": len(KEYS)}
    assert index.leading_runs([]) == {}
