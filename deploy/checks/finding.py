"""What a check found: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ...protocol.errors import HalfmoonError

Severity = Literal["fault", "slow", "warning", "ok"]
SEVERITIES: tuple[Severity, ...] = ("fault", "slow", "warning", "ok")  # the worst first


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    """The check's name: "/dev/shm", "port", "link"."""
    severity: Severity
    what: str
    """One sentence: what was looked at, and its value."""
    remedy: str = ""
    """What to do; "" where nothing is, or where `what` says it."""
    code: str = ""
    """Of the error, where it is one of protocol/errors.py."""

    @property
    def told(self) -> str:
        """What, and what to do."""
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_error(cls, check: str, error: HalfmoonError) -> Finding:
        return cls(check, "fault", error.message, code=error.code)


def ok(check: str, what: str) -> Finding:
    return Finding(check, "ok", what)


class Check(NamedTuple):
    """run() raises a HalfmoonError for what keeps a cluster from serving."""

    name: str
    run: Callable[[], Finding]


def run_check(check: Check) -> Finding:
    """What it raises becomes a finding."""
    try:
        return check.run()
    except HalfmoonError as error:
        return Finding.of_error(check.name, error)


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Stable: of two that are as bad, the one that was found first explains the other."""
    return sorted(findings, key=lambda found: SEVERITIES.index(found.severity))
