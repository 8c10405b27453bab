from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.proxy.member_metrics import MemberMetrics, MemberReport


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def members(registry: CollectorRegistry, clock: Clock) -> MemberMetrics:
    return MemberMetrics(registry, clock)


def seconds(registry: CollectorRegistry, role: str, state: str) -> float:
    found = registry.get_sample_value("halfmoon_member_seconds_total", {"role": role, "state": state})
    assert found is not None
    return found


def test_the_failure_rate_is_the_share_of_capacity_seconds_that_were_lost(
    members: MemberMetrics, registry: CollectorRegistry, clock: Clock
) -> None:
    for name in ("decode-0", "decode-1"):
        members.joined(name, "decode")
    clock.now += 30.0
    members.left("decode-1", "decode")
    clock.now += 10.0
    assert (seconds(registry, "decode", "up"), seconds(registry, "decode", "down")) == (70.0, 10.0)
    members.joined("decode-1", "decode")
    clock.now += 5.0
    assert (seconds(registry, "decode", "up"), seconds(registry, "decode", "down")) == (80.0, 10.0)


def test_time_counts_for_the_role_that_a_member_had_then(members: MemberMetrics, registry: CollectorRegistry, clock: Clock) -> None:
    members.joined("prefill-0", "prefill")
    clock.now += 3.0
    members.took_role("prefill-0", "both")
    clock.now += 4.0
    assert (seconds(registry, "prefill", "up"), seconds(registry, "both", "up")) == (3.0, 4.0)
    assert registry.get_sample_value("halfmoon_member_up", {"member": "prefill-0", "role": "both"}) == 1.0


def test_a_member_that_is_gone_is_down_and_not_absent(members: MemberMetrics, registry: CollectorRegistry) -> None:
    members.joined("store-0", "store")
    assert registry.get_sample_value("halfmoon_member_losses_total", {"member": "store-0"}) == 0.0
    members.left("store-0", "store")
    members.joined("store-0", "store")
    members.left("store-0", "store")
    assert registry.get_sample_value("halfmoon_member_up", {"member": "store-0", "role": "store"}) == 0.0
    assert registry.get_sample_value("halfmoon_member_joins_total", {"member": "store-0"}) == 2.0
    assert registry.get_sample_value("halfmoon_member_losses_total", {"member": "store-0"}) == 2.0


def test_prefill_is_lacking_only_where_there_was_some(members: MemberMetrics) -> None:
    members.joined("decode-0", "decode")
    assert not members.lacks_prefill, "a coupled cluster falls back to nothing"
    members.joined("prefill-0", "prefill")
    assert not members.lacks_prefill
    members.left("prefill-0", "prefill")
    assert members.lacks_prefill
    members.joined("both-0", "both")
    assert not members.lacks_prefill


def test_what_live_members_reported_is_read_when_somebody_asks(members: MemberMetrics, registry: CollectorRegistry) -> None:
    members.reports = lambda: [MemberReport("prefill-0", 0.5, 1200)]
    assert registry.get_sample_value("halfmoon_member_report_age_seconds", {"member": "prefill-0"}) == 0.5
    assert registry.get_sample_value("halfmoon_member_outstanding_tokens", {"member": "prefill-0"}) == 1200.0
