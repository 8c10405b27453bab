"""What the proxy measures of its members: who is alive, since when, how often it came back.

joined, left, took_role ─► per member: up or down, since when ─► seconds of each state, added up when somebody asks
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..protocol import metrics as specs
from ..protocol.exporter import ReadCounter, counter, gauge
from ..protocol.roles import ROLE_NAMES


@dataclass(slots=True)
class _Known:
    """A member that has joined at least once. What it was before `since` has been added up."""

    role: str
    is_up: bool
    since: float


class MemberReport(NamedTuple):
    member: str
    age_s: float  # of its last report
    num_outstanding_tokens: int


class MemberMetrics(Collector):
    """Told on the event loop, read by the scraping thread.

    Args:
        clock: in seconds.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self.reports: Callable[[], Iterable[MemberReport]] = lambda: ()  # of live members, set by who has them
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)  # (role, up | down)
        self._members = gauge(specs.MEMBERS, registry)
        for role in ROLE_NAMES.values():
            self._members.labels(role)
        self._joins = counter(specs.MEMBER_JOINS, registry)
        self._losses = counter(specs.MEMBER_LOSSES, registry)
        self._role_changes = counter(specs.ROLE_CHANGES, registry)
        self._role_failures = counter(specs.ROLE_CHANGE_FAILURES, registry)
        ReadCounter(specs.MEMBER_SECONDS, registry, self._all_seconds)
        registry.register(self)

    def set_members(self, role: str, num_members: int) -> None:
        self._members.labels(role).set(num_members)

    def joined(self, member: str, role: str) -> None:
        self._joins.labels(member).inc()
        self._losses.labels(member)  # 0 is not absent
        self._turned(member, role, is_up=True)

    def left(self, member: str, role: str) -> None:
        self._losses.labels(member).inc()
        self._turned(member, role, is_up=False)

    def took_role(self, member: str, role: str) -> None:
        self._turned(member, role, is_up=True)

    def changed_role(self, role: str, reason: str) -> None:
        self._role_changes.labels(role, reason).inc()

    def kept_role(self, wanted: str, code: str) -> None:
        """It did not take on the wanted one."""
        self._role_failures.labels(wanted, code).inc()

    @property
    def lacks_prefill(self) -> bool:
        """Workers prefilled here once, and none is left that does."""
        roles = [(known.role, known.is_up) for known in self._known.values()]
        return ("prefill", False) in roles and not {("prefill", True), ("both", True)} & set(roles)

    def _turned(self, member: str, role: str, *, is_up: bool) -> None:
        now, known = self._clock(), self._known.get(member)
        if known is not None:
            self._seconds[known.role, _state(known)] += now - known.since
        self._known[member] = _Known(role, is_up, now)

    def _all_seconds(self) -> list[tuple[tuple[str, str], float]]:
        now, seconds = self._clock(), defaultdict(float, self._seconds)
        for known in list(self._known.values()):
            for state in ("up", "down"):
                seconds[known.role, state] += now - known.since if state == _state(known) else 0.0
        return list(seconds.items())

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(specs.MEMBER_UP.name, specs.MEMBER_UP.help, labels=specs.MEMBER_UP.labels)
        for member, known in list(self._known.items()):
            up.add_metric((member, known.role), float(known.is_up))
        yield up
        age = GaugeMetricFamily(specs.MEMBER_REPORT_AGE.name, specs.MEMBER_REPORT_AGE.help, labels=specs.MEMBER_REPORT_AGE.labels)
        spec = specs.MEMBER_OUTSTANDING_TOKENS
        tokens = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
        for report in self.reports():
            age.add_metric((report.member,), report.age_s)
            tokens.add_metric((report.member,), report.num_outstanding_tokens)
        yield from (age, tokens)


def _state(known: _Known) -> str:
    return "up" if known.is_up else "down"
