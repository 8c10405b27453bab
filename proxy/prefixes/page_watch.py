"""Keeps the index of what stands in workers' pages true, out of their Join streams.

joined ─► the whole, in one message or several ─► changes 1, 2, 3 …       the worker leaves ─► forgotten
             ▲                                       └─ a gap, or no room in the index and room again ─┐
             └──────────── asked for again ─────────────────────────────────────────────────────────────┘
What is known may be out of date. A block that has gone is loaded or computed then, and the prediction was wrong.
"""

from __future__ import annotations

import logging

from ...protocol.tasks import Tasks
from ...protocol.v1 import control_pb2
from ..members.cluster import Cluster
from ..members.member import Member
from .index import PrefixIndex

logger = logging.getLogger(__name__)


class PageWatch:
    """index: by worker id. On the event loop."""

    def __init__(self, cluster: Cluster, index: PrefixIndex) -> None:
        self._index = index
        self._tasks = Tasks("page watch")
        self._numbers: dict[Member, int] = {}  # of the last message; a member that is not here is to send the whole
        cluster.on_prefixes(self._changed)

    async def close(self) -> None:
        await self._tasks.close()

    def _changed(self, member: Member, change: control_pb2.PrefixChange) -> None:
        if member.gone:
            return
        if change.whole:
            if member not in self._numbers:
                member.on_gone(self._left)
            self._index.drop(member.id)
        elif self._numbers.get(member) != change.number - 1:
            if member in self._numbers:
                logger.warning("%s: change %d of its pages does not follow %d", member.title, change.number, self._numbers[member])
                self._ask(member)
            return
        self._numbers[member] = change.number
        self._index.change(member.id, change.added, change.removed)
        if self._index.is_cut(member.id) and self._index.has_room():
            self._ask(member)

    def _ask(self, member: Member) -> None:
        """For the whole; nothing is known until it comes."""
        self._forget(member)
        order = control_pb2.MemberOrder(tell_prefixes=True)
        self._tasks.spawn(member.orders.tell(order), f"asking {member.title} for the blocks in its pages")

    def _left(self, member: Member) -> None:
        self._forget(member)

    def _forget(self, member: Member) -> None:
        if self._numbers.pop(member, None) is not None:
            self._index.drop(member.id)
