"""How far a chain is held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.leading_run import leading_run


@given(num_keys=st.integers(0, 40), num_held=st.integers(0, 40), num_exact=st.integers(1, 50))
def test_of_a_chain_that_is_held_from_its_start_the_run_is_found_with_few_questions(num_keys: int, num_held: int, num_exact: int) -> None:
    keys, asked = [bytes([number]) for number in range(num_keys)], []

    def holds(key: bytes) -> bool:
        asked.append(key)
        return key[0] < num_held

    assert leading_run(keys, holds, num_exact) == min(num_keys, num_held)
    assert len(asked) <= num_exact + 6


@given(st.sets(st.integers(0, 20)))
def test_among_the_first_keys_a_hole_ends_the_run(held: set[int]) -> None:
    keys = [bytes([number]) for number in range(21)]
    assert leading_run(keys, lambda key: key[0] in held, 21) == next(number for number in range(22) if number not in held)
