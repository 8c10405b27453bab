"""Which members make progress: one check of all of them, now and again. A stream that is still open proves nothing.

report ─► silent_s = 0, and the age of its oldest step        check ─► avoided: no new requests, where there are others
                                                                    └► left: gone for the proxy, its requests run elsewhere
It joins again by itself: a frozen process finds its stream ended, a stalled one is accepted once its step is over (Join waits for that).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NamedTuple

from ...protocol.awake_clock import AwakeClock
from ...protocol.config import ProxyConfig
from ...protocol.membership import REPORT_INTERVAL_S
from ...protocol.tasks import Tasks
from ...protocol.v1 import control_pb2
from .cluster import Cluster
from .member import Member

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = REPORT_INTERVAL_S


class Late(NamedTuple):
    """One thing that a member should have done by now."""

    seconds: float
    limit_s: float
    what: str


class Liveness:
    """Runs while there are members, on the event loop that they join on."""

    def __init__(self, cluster: Cluster, config: ProxyConfig) -> None:
        self._cluster = cluster
        self._config = config
        self._clock = AwakeClock(CHECK_INTERVAL_S)
        self._tasks = Tasks("liveness")
        self._running: asyncio.Task[None] | None = None
        cluster.on_join(self._joined)

    def stalled(self, load: control_pb2.MemberLoad) -> str:
        """Why a worker with this load is not to join now; "" where it is."""
        return _first(self._stalls(load, self._config.avoid_after_s))

    def gave_up(self, num_reports: int) -> bool:
        """Whether a worker that was stalled in so many reports, one after another, is to end."""
        return num_reports * REPORT_INTERVAL_S > self._config.restart_after_s

    def check(self, now: float) -> None:
        """now: of time.monotonic()."""
        awake_s, config = self._clock.tick(now), self._config
        for member in list(self._cluster.members.values()):
            member.silent_s += awake_s
            if late := self._lateness(member, config.leave_after_s):
                logger.error("%s is left: %s", member.title, late)
                self._cluster.lose(member, late)
            else:
                late = self._lateness(member, config.avoid_after_s)
                if late and not member.avoided:
                    logger.warning("%s is avoided: %s", member.title, late)
                self._cluster.avoid(member, bool(late))

    async def close(self) -> None:
        await self._tasks.close()

    def _lateness(self, member: Member, limit_s: float) -> str:
        silence = Late(member.silent_s, limit_s, f"it has not reported for {member.silent_s:.1f} s")
        return _first([silence, *self._stalls(member.load, limit_s)])

    def _stalls(self, load: control_pb2.MemberLoad, limit_s: float) -> list[Late]:
        """limit_s: of a step predicted to be short; a long one has more. A copy has no prediction, and its limit is in proportion."""
        config = self._config
        more_s = max(config.step_patience * load.step_expected_s - config.avoid_after_s, 0.0)
        step = f"it has been at one step for {load.step_age_s:.1f} s, which should take {load.step_expected_s:.3f} s"
        transfer = f"it has been at one copy to or from a store for {load.transfer_age_s:.1f} s"
        in_proportion_s = config.transfer_limit_s * limit_s / config.leave_after_s
        return [Late(load.step_age_s, limit_s + more_s, step), Late(load.transfer_age_s, in_proportion_s, transfer)]

    def _joined(self, member: Member) -> None:
        if self._running is None or self._running.done():  # one that is over may stand among the tasks for a moment
            self._running = self._tasks.spawn(self._run(), "the check of its members")

    async def _run(self) -> None:
        while self._cluster.members:
            self.check(time.monotonic())
            await asyncio.sleep(CHECK_INTERVAL_S)


def _first(found: list[Late]) -> str:
    """What is late; "" where nothing is."""
    return next((late.what for late in found if late.seconds > late.limit_s), "")
