"""SlotAllocator against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.kvstore.slots import SlotAllocator

steps = st.lists(st.tuples(st.sampled_from(["allocate", "pin", "unpin", "retain", "forget"]), st.integers(0, 4)), max_size=60)


@given(steps)
def test_leased_cached_and_free_add_up_after_every_step(todo: list[tuple[str, int]]) -> None:
    slots = SlotAllocator(5)
    pins, retained = [0] * 5, [False] * 5
    for step, slot in todo:
        legal = {
            "allocate": sum(not pins[i] and not retained[i] for i in range(5)) >= 1,
            "pin": pins[slot] > 0 or retained[slot],
            "unpin": pins[slot] > 0,
            "retain": pins[slot] > 0,
            "forget": retained[slot],
        }[step]
        if not legal:
            with pytest.raises(ValueError):
                slots.allocate(1) if step == "allocate" else getattr(slots, step)(slot)
            continue
        if step == "allocate":
            (slot,) = slots.allocate(1)
            assert not pins[slot] and not retained[slot]
            pins[slot] = 1
        else:
            found = getattr(slots, step)(slot)
            pins[slot] += {"pin": 1, "unpin": -1}.get(step, 0)
            retained[slot] = {"retain": True, "forget": False}.get(step, retained[slot])
            assert step != "unpin" or found == (pins[slot] == 0)
        leased = sum(count > 0 for count in pins)
        cached = sum(retained[i] and not pins[i] for i in range(5))
        assert (slots.num_leased, slots.num_cached, slots.num_free) == (leased, cached, 5 - leased - cached)


@given(st.data())
def test_slots_come_in_ascending_order_whatever_was_freed_before(data: st.DataObject) -> None:
    slots = SlotAllocator(12)
    for slot in data.draw(st.permutations(slots.allocate(12))):
        slots.unpin(slot)
    while slots.num_free:
        found = slots.allocate(data.draw(st.integers(1, slots.num_free)))
        assert found == sorted(found)


def test_a_lease_that_was_freed_from_its_end_is_one_run_again() -> None:
    slots = SlotAllocator(8)
    for first in (0, 4, 0, 4):
        leased = slots.allocate(4)
        assert leased == list(range(first, first + 4))
        for slot in reversed(leased):
            slots.unpin(slot)
