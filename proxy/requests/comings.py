"""Requests that nobody can serve now. They wait for a member to come: there is nothing to try before.

wait ─► [ waiting, in order ] ◄─ a member joins, or takes on another role: all are woken, one in each turn of the event loop
                              ◄─ a member that a request has given up goes on reporting: it lives, and that request is woken
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Set

from ...protocol.v1 import control_pb2
from ..members.cluster import Cluster
from ..members.member import Member

NUM_REPORTS = 2  # after which a member is known to live: one may have been under way when it died


class _Waiting:
    def __init__(self, given_up: Set[str]) -> None:
        self.woken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_reports = dict.fromkeys(given_up, 0)


class Comings:
    """Lives on the event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self._waiting: dict[_Waiting, None] = {}  # in order
        self._to_wake: deque[_Waiting] = deque()
        cluster.on_join(self._came)
        cluster.on_role(self._came)
        cluster.on_report(self._reported)

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, given_up: Set[str]) -> str:
        """Returns after a member came, or with the incarnation of one of these that turned out to live. The caller bounds the wait.

        given_up: incarnations of processes that failed the request.
        """
        waiting = _Waiting(given_up)
        self._waiting[waiting] = None
        try:
            return await waiting.woken
        finally:
            self._waiting.pop(waiting, None)

    def _came(self, member: Member) -> None:
        was_idle = not self._to_wake
        self._to_wake = deque(self._waiting)
        if was_idle and self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_next)

    def _wake_next(self) -> None:
        if not self._to_wake:
            return  # another member came, and nobody waits any more
        waiting = self._to_wake.popleft()
        if not waiting.woken.done():
            waiting.woken.set_result("")
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_next)

    def _reported(self, member: Member, load: control_pb2.MemberLoad) -> None:
        for waiting in self._waiting:
            if member.incarnation in waiting.num_reports:
                waiting.num_reports[member.incarnation] += 1
                if waiting.num_reports[member.incarnation] >= NUM_REPORTS and not waiting.woken.done():
                    waiting.woken.set_result(member.incarnation)
