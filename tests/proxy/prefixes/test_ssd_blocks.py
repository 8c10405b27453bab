"""Which blocks the index knows to stand on SSD alone, against a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.prefixes.index import PrefixIndex

KEYS = [bytes([number]) * 16 for number in range(12)]
changes = st.lists(
    st.tuples(st.sampled_from(["store", "demote", "promote", "evict", "replace", "drop"]), st.integers(0, 12), st.integers(0, 12))
)


@given(st.sampled_from(["a:1", "b:2"]), changes)
def test_of_a_chain_whose_end_cools_first_the_index_knows_what_stands_where(store: str, steps: list[tuple[str, int, int]]) -> None:
    index = PrefixIndex()
    index.change("other:1", KEYS, ())
    held = warm = 0  # leading blocks on any tier, and in DRAM
    for what, first, second in steps:
        if what == "store":
            index.change(store, KEYS[held:first], (), (), KEYS[warm : min(first, held)])
            held, warm = max(held, first), max(warm, first)
        elif what == "demote" and first < warm:
            index.change(store, (), (), KEYS[first:warm])
            warm = first
        elif what == "promote" and warm < first <= held:
            index.change(store, (), (), (), KEYS[warm:first])
            warm = first
        elif what == "evict" and first < held:
            index.change(store, (), KEYS[first:held])
            held, warm = first, min(warm, first)
        elif what == "replace":
            warm, held = sorted((first, second))
            index.replace(store, KEYS[:held], KEYS[warm:held])
        elif what == "drop":
            index.drop(store)
            held = warm = 0
        for wanted in range(len(KEYS) + 1):
            runs = index.leading_runs(KEYS[:wanted])
            num_cold = max(min(held, wanted) - warm, 0)
            assert index.ssd_runs(KEYS[:wanted], runs) == ({store: num_cold} if num_cold else {})
