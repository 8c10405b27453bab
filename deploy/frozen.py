"""Which processes are there and do nothing: members by what the proxy says of them, the proxy by its silence.

status ─► answered: a member that serves and has not been a member for restart_after_s ─► frozen
       └► no answer for leave_after_s ─► said; for restart_after_s ─► the proxy is frozen
Their processes are to end, and then start again like any that died. Pure: no I/O, no clock of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import NamedTuple

from ..protocol.awake_clock import AwakeClock
from ..protocol.config import ProxyConfig

CHECK_INTERVAL_S = 0.5
PROXY = "proxy"


class Looked(NamedTuple):
    said: str  # of the proxy; "" where there is no news
    frozen: list[str]  # ids


class Frozen:
    """config: of the proxy."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._clock = AwakeClock(CHECK_INTERVAL_S)
        self._silent_s: dict[tuple[str, int], float] = {}  # (id, number of its process)
        self._told: tuple[str, int] | None = None  # the proxy whose silence was said

    def look(self, now: float, serving: Mapping[str, int], members: Set[str] | None) -> Looked:
        """Called each CHECK_INTERVAL_S.

        Args:
            now: of time.monotonic().
            serving: the processes that are up: id -> which of its processes it is.
            members: ids that the proxy has answered with since the last look. None: it has not answered.
        """
        awake_s = self._clock.tick(now)
        silent_s, self._silent_s = self._silent_s, {}
        for process in serving.items():
            heard = self._hears(process[0], members)
            before = silent_s.get(process, 0.0)
            self._silent_s[process] = 0.0 if heard else before + (awake_s if heard is False else 0.0)
        frozen = [process for process, seconds in self._silent_s.items() if seconds > self._config.restart_after_s]
        for process in frozen:
            self._silent_s[process] = -math.inf  # it ends; once is enough
        return Looked(self._said(serving), [member_id for member_id, _ in frozen])

    def _hears(self, member_id: str, members: Set[str] | None) -> bool | None:
        """None: nobody can tell."""
        if member_id == PROXY:
            return members is not None
        return None if members is None else member_id in members

    def _said(self, serving: Mapping[str, int]) -> str:
        process = (PROXY, serving.get(PROXY, 0))
        silent_s = self._silent_s.get(process, 0.0)
        if silent_s > self._config.leave_after_s and self._told != process:
            self._told = process
            return f"has not answered for {silent_s:.1f} s"
        if not silent_s and self._told is not None:
            told, self._told = self._told, None
            return "answers again" if told == process else ""
        return ""
