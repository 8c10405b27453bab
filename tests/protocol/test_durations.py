"""protocol/durations.py: what a message may bring as a duration."""

from __future__ import annotations

import math

import pytest

from halfmoon.protocol.durations import LONGEST_S, seconds
from halfmoon.protocol.errors import InvalidRequest

FOUND = [(0.0, 0.0), (1.5, 1.5), (-1.0, 0.0), (-math.inf, 0.0), (math.inf, LONGEST_S), (1e300, LONGEST_S)]


@pytest.mark.parametrize(("value", "found"), FOUND)
def test_a_duration_is_one_that_an_event_loop_can_wait_for(value: float, found: float) -> None:
    assert seconds(value, "deadline_s") == found


def test_nan_is_no_duration() -> None:
    with pytest.raises(InvalidRequest, match="deadline_s is NaN") as caught:
        seconds(math.nan, "deadline_s")
    assert caught.value.fields == {"param": "deadline_s"}
