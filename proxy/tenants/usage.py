"""Tokens that a tenant has used in this day and this month, by UTC's calendar. They outlive the proxy (usage_file.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple


class Period(NamedTuple):
    name: str  # "2026-11-28", "2026-11"; later ones sort behind
    end: float  # seconds since 1970


def day(name: str) -> Period:
    """Raises ValueError."""
    return Period(name, _begin(date.fromisoformat(name) + timedelta(days=1)))


def month(name: str) -> Period:
    """Raises ValueError."""
    first = date.fromisoformat(f"{name}-01")
    return Period(name, _begin((first + timedelta(days=31)).replace(day=1)))


def _begin(at: date) -> float:
    return datetime(at.year, at.month, at.day, tzinfo=UTC).timestamp()


class Count:
    """Of one period, and anew with the next one. A clock that is set back does not end it."""

    def __init__(self, named: Callable[[str], Period], name_len: int, now: float) -> None:
        self._named = named
        self._name_len = name_len
        self.period = self._period(now)
        self.num_tokens = 0

    def at(self, now: float) -> int:
        """The tokens of the period that it is now. now: seconds since 1970."""
        if now >= self.period.end:
            self.period, self.num_tokens = self._period(now), 0
        return self.num_tokens

    def take(self, num_tokens: int, now: float) -> None:
        self.num_tokens = self.at(now) + num_tokens

    def restore(self, name: str, num_tokens: int) -> None:
        """As it was saved. Raises ValueError."""
        self.period, self.num_tokens = self._named(name), num_tokens

    def _period(self, now: float) -> Period:
        return self._named(datetime.fromtimestamp(now, UTC).isoformat()[: self._name_len])


class Usage:
    """clock: as time.time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.day = Count(day, len("2026-11-28"), clock())
        self.month = Count(month, len("2026-11"), clock())

    def take(self, num_tokens: int) -> None:
        now = self.clock()
        self.day.take(num_tokens, now)
        self.month.take(num_tokens, now)
