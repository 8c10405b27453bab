"""Quotas of a day and a month: by the calendar, over restarts, and told."""

from __future__ import annotations

import asyncio
import calendar
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.errors import ConfigError, QuotaExceeded
from halfmoon.proxy.tenants import gate as gate_module
from halfmoon.proxy.tenants.gate import Gate
from halfmoon.proxy.tenants.keys_file import KeysFile, TenantSettings
from halfmoon.proxy.tenants.tenant import QuotaUse, Tenant
from halfmoon.proxy.tenants.usage import Usage, day, month
from halfmoon.tests.waiting import until

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
HOUR_S, DAY_S = 3600.0, 86400.0


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@given(st.dates(min_value=datetime(1971, 1, 1).date(), max_value=datetime(2099, 12, 30).date()))
def test_a_period_ends_where_the_calendar_begins_the_next_one(date) -> None:
    ends = day(date.isoformat()).end, month(date.isoformat()[:7]).end
    days_left = calendar.monthrange(date.year, date.month)[1] - date.day
    assert [datetime.fromtimestamp(end, UTC).date() for end in ends] == [date + timedelta(days=1), date + timedelta(days=1 + days_left)]
    assert all(end % DAY_S == 0.0 for end in ends)


def test_a_quota_is_told_with_the_time_that_is_left_and_begins_anew_with_its_period() -> None:
    clock = Clock()
    tenant = Tenant("acme", TenantSettings(tokens_per_day=100, tokens_per_month=250), usage=Usage(clock))
    tenant.admit(60)
    tenant.spend(60)  # an answer is not cut short
    with pytest.raises(QuotaExceeded, match="quota of 100 tokens a day is used up") as caught:
        tenant.admit(1)
    assert caught.value.retry_after_s == 12 * HOUR_S and caught.value.http_status == 429
    assert tenant.quota_uses() == [QuotaUse("acme", "day", 1.2), QuotaUse("acme", "month", 0.48)]
    clock.now += 12 * HOUR_S
    tenant.admit(90)
    tenant.spend(50)
    clock.now += DAY_S
    with pytest.raises(QuotaExceeded, match="quota of 250 tokens a month") as caught:
        tenant.admit(1)
    assert caught.value.retry_after_s == DAY_S, "the 30th is the last of November"
    clock.now += DAY_S
    tenant.admit(1)


def test_a_clock_that_is_set_back_gives_nobody_a_quota_anew() -> None:
    clock = Clock(NOON + 12 * HOUR_S)
    tenant = Tenant("acme", TenantSettings(tokens_per_day=10), usage=Usage(clock))
    tenant.admit(10)
    clock.now -= HOUR_S
    with pytest.raises(QuotaExceeded):
        tenant.admit(1)


def test_a_quota_that_is_given_later_counts_what_was_used_before() -> None:
    tenant = Tenant("acme", TenantSettings(), usage=Usage(Clock()))
    tenant.admit(100)
    tenant.change(TenantSettings(tokens_per_month=100))
    with pytest.raises(QuotaExceeded):
        tenant.admit(1)


class Kept:
    """A gate of a tenant with a quota, as a proxy has it; begun as often as a proxy starts."""

    def __init__(self, folder: Path) -> None:
        self.path, self.clock = folder / "keys.json", Clock()
        file, self.key = KeysFile({}, {}).with_key("acme", {"tokens_per_day": 100})
        file.save(self.path)
        self.told: list[list[QuotaUse]] = []

    def gate(self) -> Gate:
        return Gate(self.path, clock=self.clock)

    def tenant(self, gate: Gate) -> Tenant:
        return gate.tenant_of(f"Bearer {self.key}")

    @property
    def saved(self) -> dict[str, object]:
        return json.loads(self.path.with_name("keys.json.usage").read_text())


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


async def test_what_is_used_outlives_the_proxy_whether_it_stops_or_is_killed(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "SAVE_EVERY_S", 0.01)
    first = kept.gate()
    keeping = asyncio.create_task(first.keep(kept.told.append))
    kept.tenant(first).admit(30)
    await until(lambda: kept.saved.get("acme") == {"day": ["2026-11-28", 30], "month": ["2026-11", 30]})
    killed = kept.gate()  # of what is on disk while the first lives
    assert kept.tenant(killed).usage.day.at(NOON) == 30
    kept.tenant(first).spend(70)
    first.close()
    await keeping
    assert kept.told[-1] == [QuotaUse("acme", "day", 1.0)]
    with pytest.raises(QuotaExceeded):
        kept.tenant(kept.gate()).admit(1)
    kept.clock.now += DAY_S
    kept.tenant(kept.gate()).admit(1)


async def test_a_tenant_that_is_taken_out_and_put_back_goes_on_where_it_was(kept: Kept) -> None:
    gate, with_it = kept.gate(), kept.path.read_text()
    kept.tenant(gate).admit(100)
    KeysFile({}, {}).save(kept.path)
    with pytest.raises(Exception, match="not known"):
        kept.tenant(gate)
    kept.path.write_text(with_it)
    with pytest.raises(QuotaExceeded):
        kept.tenant(gate).admit(1)


async def test_a_disk_that_takes_nothing_is_said_once_and_tried_again(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate_module, "SAVE_EVERY_S", 0.01)
    gate, tried, save = kept.gate(), list[int](), gate_module.save_usage

    def full(path: Path, tree: object) -> None:
        tried.append(1)
        if len(tried) < 4:
            raise OSError(28, "No space left on device")
        save(path, tree)  # type: ignore[arg-type]

    monkeypatch.setattr(gate_module, "save_usage", full)
    keeping = asyncio.create_task(gate.keep(kept.told.append))
    with caplog.at_level(logging.ERROR):
        kept.tenant(gate).admit(30)
        await until(lambda: "acme" in kept.saved and kept.saved["acme"]["day"][1] == 30)  # type: ignore[index]
    gate.close()
    await keeping
    assert caplog.text.count("No space left") == 1


def test_a_file_that_cannot_be_read_or_written_is_an_error_at_the_start(kept: Kept) -> None:
    usage = kept.path.with_name("keys.json.usage")
    for broken in ("{", '{"acme": {"day": ["today", 1], "month": ["2026-11", 1]}}', '{"acme": 3}', "[]"):
        usage.write_text(broken)
        with pytest.raises(ConfigError, match="all quotas begin anew") as caught:
            kept.gate()
        assert caught.value.fields == {"key": "proxy.usage_file"}
    with pytest.raises(ConfigError, match="name another file"):
        Gate(kept.path, kept.path.parent / "none" / "usage")


def test_without_a_quota_nothing_is_written(kept: Kept) -> None:
    file, _ = KeysFile({}, {}).with_key("free", {})
    file.save(kept.path)
    kept.gate()
    assert [path.name for path in kept.path.parent.iterdir()] == ["keys.json"]
