"""Durations as messages bring them. NaN and infinity are doubles too, and an event loop breaks over them, or never wakes."""

from __future__ import annotations

from .errors import InvalidRequest

LONGEST_S = 30 * 24 * 3600.0


def seconds(value: float, name: str) -> float:
    """At least 0 and at most LONGEST_S, to which what is beyond is cut. Raises InvalidRequest for NaN."""
    if value != value:
        raise InvalidRequest(f"{name} is NaN; it must be a number of seconds", param=name)
    return min(max(value, 0.0), LONGEST_S)
