from __future__ import annotations

import pytest

from halfmoon.deploy.load.balancer import make_balancer
from halfmoon.protocol.errors import ConfigError


def test_round_robin_takes_turns(request_of) -> None:
    balancer = make_balancer("round_robin", 3)
    assert [balancer.pick(request_of(index=number)) for number in range(5)] == [0, 1, 2, 0, 1]


def test_least_outstanding_goes_where_the_fewest_tokens_are_under_way(request_of) -> None:
    balancer = make_balancer("least_outstanding", 2)
    long, short, next_, last = (request_of(index=number, num_input=size) for number, size in enumerate((1000, 100, 100, 100)))
    assert [balancer.pick(long), balancer.pick(short), balancer.pick(next_)] == [0, 1, 1]
    balancer.ended(long, 0)
    assert balancer.pick(last) == 0


def test_prefix_aware_returns_to_where_a_prompt_was_unless_that_is_too_busy(request_of) -> None:
    balancer = make_balancer("prefix_aware", 2)
    again = [request_of(index=number, num_input=640, seed=7) for number in range(4)]
    other = request_of(index=9, num_input=640, seed=8)
    assert balancer.pick(again[0]) == 0
    balancer.ended(again[0], 0)
    assert balancer.pick(again[1]) == 0  # known there, and nobody waits
    assert balancer.pick(other) == 1  # known nowhere: 644 under way at 0
    balancer.ended(other, 1)
    assert balancer.pick(again[2]) == 1  # 640 known at 0, but 644 wait there
    balancer.ended(again[1], 0)
    assert balancer.pick(again[3]) == 0  # 644 wait at 1 now
    balancer.ended(again[2], 1)
    balancer.ended(again[3], 0)
    assert balancer.pick(other) == 1  # nobody waits anywhere, and it is known there


def test_a_wrong_name_is_told_with_the_right_ones() -> None:
    with pytest.raises(ConfigError, match="prefix_aware"):
        make_balancer("nearest", 2)
