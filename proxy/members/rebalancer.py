"""Workers' roles, as the policy decides them now and again.

every interval_s, or when a worker leaves ─► the policy deliberates, in short pieces ─► orders ─► each worker says its role ─► noted
                                                                                            └─ refusal, silence, loss ─► its former role
Nothing is drained: what runs on a worker ends there. One that did not change is left alone for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.errors import HalfmoonError
from ...protocol.roles import ROLE_NUMBERS, WORKER_ROLES
from ...protocol.tasks import Tasks
from ...protocol.v1 import control_pb2
from ..conductor.placement import Snapshot
from ..conductor.policies.base import RoleChange, RolePlanner
from ..member_metrics import MemberMetrics
from .cluster import Cluster
from .member import Member

ANSWER_S = 5.0  # for a worker's answer; one that makes no progress is left before
FIXED_S = 30.0  # in which a worker that did not take a role on is not asked again
NUM_NOTED = 16  # changes
NEEDED = frozenset({ROLE_NUMBERS["prefill"], ROLE_NUMBERS["decode"]})
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NotedChange:
    change: RoleChange
    former: str
    at: float  # of time.monotonic()
    error: str = ""  # why it kept its former role

    def to_proto(self) -> control_pb2.StatusReply.RoleChange:
        return control_pb2.StatusReply.RoleChange(
            member=self.change.member_id,
            role=ROLE_NUMBERS[self.change.role],
            former=ROLE_NUMBERS[self.former],
            reason=self.change.reason,
            error=self.error,
            ago_s=time.monotonic() - self.at,
        )


class Rebalancer:
    """Runs while there are members, on the event loop that they join on.

    Args:
        interval_s: between two decisions.
        clock: the one that placements are made by.
    """

    def __init__(
        self,
        cluster: Cluster,
        roles: RolePlanner,
        metrics: MemberMetrics,
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.noted: deque[NotedChange] = deque(maxlen=NUM_NOTED)  # the latest first
        self._cluster = cluster
        self._roles = roles
        self._metrics = metrics
        self._interval_s = interval_s
        self._clock = clock
        self._failed: dict[str, float] = {}  # incarnation -> when it did not take a role on
        self._left = asyncio.Event()  # a worker has, so that a role may be missing
        self._tasks = Tasks("roles")
        self._running: asyncio.Task[None] | None = None
        cluster.on_join(self._joined)

    async def rebalance(self) -> None:
        """Decides once, and returns when every worker has answered."""
        schema = self._cluster.schema
        if schema is None:
            return
        changes = await self._decide(self._cluster.workers(schema.block_size, self._clock()))
        await asyncio.gather(*map(self._change, changes))

    async def close(self) -> None:
        await self._tasks.close()

    async def _decide(self, seen: Snapshot) -> tuple[RoleChange, ...]:
        thinking = self._roles.deliberate(seen, self._fixed())
        while True:
            try:
                next(thinking)
            except StopIteration as decided:
                return decided.value
            await asyncio.sleep(0)

    def _fixed(self) -> frozenset[str]:
        """Ids of workers that can't take both roles, or did not take one on of late."""
        now = self._clock()
        self._failed = {incarnation: at for incarnation, at in self._failed.items() if now - at < FIXED_S}
        members = [one for one in self._cluster.members.values() if one.role in WORKER_ROLES]
        return frozenset(one.id for one in members if one.incarnation in self._failed or not NEEDED <= set(one.info.roles))

    async def _change(self, change: RoleChange) -> None:
        member = self._cluster.members.get(change.member_id)
        if member is None:  # it left while this was decided
            return
        former, error = member.role, ""
        try:
            await self._cluster.set_role(member, change.role, ANSWER_S, change.reason)
        except HalfmoonError as failure:
            error = failure.message
            self._failed[member.incarnation] = self._clock()
            self._metrics.kept_role(change.role, failure.code)
            logger.warning("%s keeps its role and does not take on the role %s: %s", member.title, change.role, error)
        else:
            self._metrics.changed_role(change.role, change.cause)
            logger.info("%s was %s until now: %s", member.title, former, change.reason)
        self.noted.appendleft(NotedChange(change, former, time.monotonic(), error))

    def _joined(self, member: Member) -> None:
        if member.role not in WORKER_ROLES:
            return
        member.on_gone(lambda _: self._left.set())
        if self._running is None or self._running.done():
            self._running = self._tasks.spawn(self._run(), "deciding about roles")

    async def _run(self) -> None:
        while self._cluster.members:
            self._left.clear()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._left.wait()
            except TimeoutError:
                pass  # it is time
            await self.rebalance()
