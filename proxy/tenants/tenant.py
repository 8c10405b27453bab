"""A tenant as the proxy serves it: its limits, and what it has used of them.

request ─► admit: priority, requests and tokens of this minute, tokens of this day and month
       └─► tokens of the answer are spent as they come, beyond what is left, too
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from ...protocol.errors import PermissionDenied, QuotaExceeded, RateLimited
from .keys_file import TenantSettings
from .usage import Count, Usage

MINUTE_S = 60.0


class TokenBucket:
    """Fills with `per_minute` a minute, up to that many; may be in debt. per_minute 0: without a limit."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, now: float) -> float:
        """Seconds until something may be taken; 0.0: now."""
        if not self.per_minute:
            return 0.0
        self._fill(now)
        return max(0.0, 1.0 - self._level) * MINUTE_S / self.per_minute

    def take(self, amount: float, now: float) -> None:
        if self.per_minute:
            self._fill(now)
            self._level -= amount

    def change(self, per_minute: int, now: float) -> None:
        """What was used stays used."""
        if per_minute != self.per_minute:
            self._fill(now)
            used = self.per_minute - self._level if self.per_minute else 0.0
            self.per_minute, self._level, self._at = per_minute, per_minute - used, now

    def _fill(self, now: float) -> None:
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / MINUTE_S)
        self._at = now


class QuotaUse(NamedTuple):
    tenant: str
    period: str  # day, month
    ratio: float  # used, of the whole; above 1.0 where the last answer went beyond it


class Tenant:
    """clock: as time.monotonic. usage: of this day and month; None: nothing yet. Belongs to the event loop."""

    def __init__(
        self, name: str, settings: TenantSettings, clock: Callable[[], float] = time.monotonic, usage: Usage | None = None
    ) -> None:
        self.name = name
        self.usage = usage or Usage()
        self._clock = clock
        self._requests = TokenBucket(settings.requests_per_minute, clock())
        self._tokens = TokenBucket(settings.tokens_per_minute, clock())
        self.change(settings)

    def change(self, settings: TenantSettings) -> None:
        self.salt = bytes.fromhex(settings.salt)
        self.settings = settings
        self._first_priority = settings.first_priority
        self._requests.change(settings.requests_per_minute, self._clock())
        self._tokens.change(settings.tokens_per_minute, self._clock())

    def require_priority(self, priority: int) -> None:
        """Raises PermissionDenied."""
        if priority < self._first_priority:
            raise PermissionDenied(
                f"priority is {priority}; this key's requests may have {self._first_priority} or more (lower is sooner)", param="priority"
            )

    def admit(self, num_prompt_tokens: int) -> None:
        """One more request. Raises RateLimited, QuotaExceeded, and nothing is used then.

        A large prompt is let in, and paid for by waiting after it.
        """
        self._require_quota()
        now = self._clock()
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if wait_s := bucket.wait_s(now):
                raise RateLimited(
                    f"the limit of {bucket.per_minute} {what} a minute is used up; come back in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                    limit=what,
                )
        self._requests.take(1, now)
        self._tokens.take(num_prompt_tokens, now)
        self.usage.take(num_prompt_tokens)

    def quota_uses(self) -> list[QuotaUse]:
        now = self.usage.clock()
        return [QuotaUse(self.name, what, count.at(now) / limit) for what, limit, count in self._quotas()]

    def _quotas(self) -> list[tuple[str, int, Count]]:
        """(period, tokens, what is used of them) of each that the tenant has."""
        settings, usage = self.settings, self.usage
        both = (("day", settings.tokens_per_day, usage.day), ("month", settings.tokens_per_month, usage.month))
        return [quota for quota in both if quota[1]]

    def _require_quota(self) -> None:
        now = self.usage.clock()
        for what, limit, count in self._quotas():
            if count.at(now) >= limit:
                wait_s = count.period.end - now
                raise QuotaExceeded(
                    f"the quota of {limit} tokens a {what} is used up; the next {what} begins at midnight UTC, in {wait_s / 3600:.1f} h",
                    retry_after_s=wait_s,
                    limit=f"tokens_per_{what}",
                )

    def spend(self, num_tokens: int) -> None:
        """Tokens of an answer."""
        self.usage.take(num_tokens)
        if self._tokens.per_minute:
            self._tokens.take(num_tokens, self._clock())
