from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.kvstore.eviction import LRU, create_eviction_policy
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


def test_an_unknown_policy_is_refused_by_name() -> None:
    assert isinstance(create_eviction_policy("lru"), LRU)
    with pytest.raises(ConfigError, match="'fifo'; it must be one of 'lru'"):
        create_eviction_policy("fifo")
