"""proxy/tenants/tenant.py: limits, against a plain simulation second by second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.errors import PermissionDenied, RateLimited
from halfmoon.proxy.tenants.keys_file import TenantSettings
from halfmoon.proxy.tenants.tenant import Tenant, TokenBucket


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100)), max_size=60))
def test_a_bucket_lets_through_a_minute_s_amount_at_once_and_then_at_its_rate(per_minute: int, steps: list[tuple[float, int]]) -> None:
    bucket, now, taken, largest = TokenBucket(per_minute, 0.0), 0.0, 0, 0
    for gap_s, amount in steps:
        now += gap_s
        wait_s = bucket.wait_s(now)
        if wait_s == 0.0:
            bucket.take(amount, now)
            taken, largest = taken + amount, max(largest, amount)
        else:
            assert bucket.wait_s(now + wait_s + 1e-6) == 0.0, "who waits as told is let in"
        assert taken <= per_minute * (1 + now / 60.0) + largest


def test_requests_over_the_limit_are_told_when_to_come_back_and_cost_nothing() -> None:
    clock = Clock()
    tenant = Tenant("acme", TenantSettings(requests_per_minute=2), clock)
    tenant.admit(10)
    tenant.admit(10)
    for _ in range(5):
        with pytest.raises(RateLimited, match="limit of 2 requests a minute") as caught:
            tenant.admit(10)
        assert caught.value.retry_after_s == pytest.approx(30.0)
    clock.now += 30.01
    tenant.admit(10)


def test_the_tokens_of_answers_count_and_a_large_prompt_is_paid_for_afterwards() -> None:
    clock = Clock()
    tenant = Tenant("acme", TenantSettings(tokens_per_minute=600), clock)
    tenant.admit(500)
    tenant.spend(400)  # 300 in debt
    with pytest.raises(RateLimited, match="600 tokens a minute") as caught:
        tenant.admit(1)
    assert caught.value.retry_after_s == pytest.approx(30.1, abs=0.01)
    clock.now += 31
    tenant.admit(5000)
    with pytest.raises(RateLimited) as caught:
        tenant.admit(1)
    assert caught.value.retry_after_s > 400


def test_changed_limits_hold_at_once_and_what_was_used_stays_used() -> None:
    clock = Clock()
    tenant = Tenant("acme", TenantSettings(requests_per_minute=2), clock)
    tenant.admit(1)
    tenant.admit(1)
    tenant.change(TenantSettings(requests_per_minute=3))
    tenant.admit(1)
    with pytest.raises(RateLimited):
        tenant.admit(1)
    tenant.change(TenantSettings())
    for _ in range(100):
        tenant.admit(1)


def test_a_request_is_no_sooner_than_its_tenant_s_first_priority() -> None:
    tenant = Tenant("acme", TenantSettings(first_priority=0), Clock())
    tenant.require_priority(0)
    tenant.require_priority(7)
    with pytest.raises(PermissionDenied, match="may have 0 or more") as caught:
        tenant.require_priority(-1)
    assert caught.value.fields["param"] == "priority"
