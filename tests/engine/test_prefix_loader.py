"""What a worker tells a store that computing takes."""

from __future__ import annotations

from typing import Any

import pytest

from halfmoon.engine.prefix_loader import HALF_LIFE_TOKENS, PrefixLoader


def test_a_few_tokens_that_pay_for_a_whole_step_say_little_of_many() -> None:
    nothing: Any = None
    loader = PrefixLoader(nothing, nothing, nothing, nothing, nothing, nothing)
    loader.computed(1e-3, 1600)
    for _ in range(10):
        loader.computed(1e-2, 8)
    assert loader._seconds_per_token < 1.3e-3
    for _ in range(10):
        loader.computed(4e-3, HALF_LIFE_TOKENS)
    assert loader._seconds_per_token == pytest.approx(4e-3, rel=0.01), "a machine that has become slower is believed"
