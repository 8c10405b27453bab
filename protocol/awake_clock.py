"""Seconds that a process has been awake, for judging others by their silence.

tick ─ 0.2 s ─► tick ─ 20 s: it was stopped, or its machine was ─► tick        counted: 0.2 s, then MOST_GAPS of them
After such a gap everybody looks silent: what they sent meanwhile has not been read yet.
"""

from __future__ import annotations

MOST_GAPS = 2  # intervals between ticks, that a gap may count at most


class AwakeClock:
    """interval_s: the usual gap between two ticks."""

    def __init__(self, interval_s: float) -> None:
        self._most_s = MOST_GAPS * interval_s
        self._last: float | None = None

    def tick(self, now: float) -> float:
        """Seconds since the last tick, as they count; 0 at the first. now: of time.monotonic()."""
        last, self._last = self._last, now
        return 0.0 if last is None else min(now - last, self._most_s)
