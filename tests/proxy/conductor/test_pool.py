"""Columns of workers against the workers themselves, and rows under keys against a dict."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.conductor.member_state import MemberState
from halfmoon.proxy.conductor.pool import Pool, total
from halfmoon.proxy.conductor.rows import FIRST_SIZE, Rows

numbers = st.integers(0, 50)
members = st.lists(
    st.builds(
        MemberState, id=st.integers(0, 10**6).map(str), incarnation=st.sampled_from("abc"), store_address=st.sampled_from("xyz"),
        num_outstanding_tokens=st.integers(0, 3), kv_capacity_tokens=numbers, busy_until_s=st.none() | st.floats(0, 9),
        num_requests=numbers, num_running=numbers, num_running_tokens=numbers, role=st.sampled_from(["", "prefill", "decode"]),
    ),
    min_size=1, max_size=12, unique_by=lambda member: member.id,
)  # fmt: skip


@given(members, st.data())
def test_rows_taken_left_out_and_joined_are_the_workers_that_they_were(found: list[MemberState], data: st.DataObject) -> None:
    pool = Pool.of(found)
    assert list(pool) == found and [pool[row] for row in range(len(pool))] == found
    wanted = data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
    kept = pool.keep(np.array(wanted))
    assert list(kept) == [member for member, is_wanted in zip(found, wanted, strict=True) if is_wanted]
    assert (kept is pool) == all(wanted)
    assert list(pool.with_role("decode")) == [member for member in found if member.role == "decode"]
    assert list(pool.without_role("prefill")) == [member for member in found if member.role != "prefill"]
    assert list(pool.without(frozenset("ab"))) == [member for member in found if member.incarnation == "c"]
    joined = pool.join(kept)
    assert list(joined) == [*found, *kept] and joined.roster is pool.join(kept).roster
    assert pool.roster.decodes_its_own.tolist() == [member.role in ("decode", "coupled") for member in found]


@given(members, st.dictionaries(st.sampled_from("xyzw"), numbers))
def test_what_stores_hold_is_seen_at_each_worker_beside_them(found: list[MemberState], held: dict[str, int]) -> None:
    expected = [held.get(member.store_address, 0) for member in found]
    pool = Pool.of(found)
    assert pool.held(held).tolist() == expected and pool.with_held(held).num_held_blocks is not None
    assert pool.with_held(held).join(pool.with_held(held)).held({}).tolist() == expected * 2


@given(members, st.integers(0, 10**6).map(str))
def test_ties_go_to_the_first_id_and_turns_to_the_next(found: list[MemberState], last: str) -> None:
    pool = Pool.of(found)
    least = min(found, key=lambda member: (member.num_outstanding_tokens, member.id))
    assert pool[pool.least(pool.num_outstanding_tokens)] == least
    assert pool[pool.after(last)] == min(found, key=lambda member: (member.id <= last, member.id))
    row = pool.row_of(last)
    assert (row is None) == all(member.id != last for member in found) and (row is None or found[row].id == last)


@given(st.lists(st.floats(-1e6, 1e6)))
def test_a_total_is_a_loop_s_sum_to_the_last_bit(values: list[float]) -> None:
    expected = 0.0
    for value in values:
        expected += value
    assert total(np.array(values)) == expected


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * FIRST_SIZE), st.integers(-9, 9)), max_size=400))
def test_rows_hold_what_a_dict_would(acts: list[Any]) -> None:
    rows: Rows[int] = Rows(np.int64, np.float64)
    expected: dict[int, tuple[int, float]] = {}
    for is_put, key, value in acts:
        if is_put:
            rows.put(key, value, value / 2)
            expected[key] = (value, value / 2)
        else:
            assert rows.remove(key) == (expected.pop(key, None) is not None)
    numbers, halves = rows.columns()
    assert sorted(zip(numbers.tolist(), halves.tolist(), strict=True)) == sorted(expected.values())
    assert len(rows) == len(expected) and all(key in rows and rows.get(key, 0) == expected[key][0] for key in expected)
