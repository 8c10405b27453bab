"""Who is alive: prefill workers, decode workers and stores, by their Join streams.

join ─► members[id] ◄─ replaced by a newer incarnation of the same id        leave ─► gone at once, its observers told
snapshot() ─► the workers whose own store is alive, with their load          ─► Conductor
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...protocol.errors import DeadlineExceeded, InvalidRequest
from ...protocol.roles import ROLE_NAMES, ROLE_NUMBERS, WORKER_ROLES, WorkerRole, decodes, prefills
from ...protocol.schema import KVSchema
from ...protocol.v1 import control_pb2
from ..conductor.placement import MemberState, Snapshot
from ..metrics import ProxyMetrics
from .member import Member

JoinCallback = Callable[[Member], None]
ReportCallback = Callable[[Member, control_pb2.MemberLoad], None]
BusyUntil = Callable[[Member], float]


class Cluster:
    def __init__(self, metrics: ProxyMetrics, schema: KVSchema | None = None) -> None:
        """schema: what workers must hold; None: what the first worker brings, for as long as there is one."""
        self.members: dict[str, Member] = {}
        self._metrics = metrics
        self._given_schema = schema
        self._pools: tuple[list[Member], list[Member]] | None = None  # candidates for prefill and decode; None: somebody came or went
        self._superseded: set[str] = set()  # incarnations that a newer process of their id has replaced
        self._join_callbacks: list[JoinCallback] = []
        self._report_callbacks: list[ReportCallback] = []
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def schema(self) -> KVSchema | None:
        if self._given_schema is not None:
            return self._given_schema
        return next((member.schema for member in self.members.values() if member.role in WORKER_ROLES), None)

    @property
    def max_model_len(self) -> int:
        """Tokens that every live worker takes; 0 without one."""
        lens = [member.info.max_model_len for member in self.members.values() if member.role in WORKER_ROLES]
        return min((length for length in lens if length > 0), default=0)

    def on_join(self, callback: JoinCallback) -> None:
        """callback runs for every process that joins from now on."""
        self._join_callbacks.append(callback)

    def on_report(self, callback: ReportCallback) -> None:
        """callback runs for every load report from now on."""
        self._report_callbacks.append(callback)

    def report(self, member: Member, load: control_pb2.MemberLoad, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED) -> None:
        """role: that it has now; unspecified: as before."""
        self._heard_role(member, role)
        member.report(load)
        for callback in self._report_callbacks:
            callback(member, load)

    async def set_role(self, member: Member, role: WorkerRole, timeout_s: float) -> None:
        """Has a worker take on a role; returns once it has confirmed it. Placements go by the new role from the call on.

        What was placed on it ends there. Whatever this raises, the role is the former one again: InvalidRequest for a role that the
        worker does not have, its own refusal, DeadlineExceeded where it does not answer, WorkerLost where it leaves.
        """
        if ROLE_NUMBERS[role] not in member.info.roles:
            found = ", ".join(sorted(ROLE_NAMES[number] for number in member.info.roles)) or "none but its own"
            raise InvalidRequest(f"{member.title} can't take on the role {role}; it can take {found}")
        async with member.orders.one_at_a_time:
            former = member.role
            self._change_role(member, role)
            try:
                async with asyncio.timeout(timeout_s):
                    await member.orders.give(control_pb2.MemberOrder(role=ROLE_NUMBERS[role]))
            except TimeoutError as error:
                self._change_role(member, former)
                raise DeadlineExceeded(f"{member.title} did not say within {timeout_s:g} s that it takes on the role {role}") from error
            except BaseException:
                self._change_role(member, former)
                raise

    def _heard_role(self, member: Member, role: control_pb2.Role) -> None:
        """It may have taken on a role whose order was given up meanwhile. Raises InvalidRequest for what is no role."""
        if role not in (control_pb2.ROLE_UNSPECIFIED, *ROLE_NAMES):
            raise InvalidRequest(f"{member.title} reports role number {role}, which this proxy does not know; run one version on both")
        if role and ROLE_NAMES[role] != member.role and not member.orders.pending:
            self._change_role(member, ROLE_NAMES[role])

    def _change_role(self, member: Member, role: str) -> None:
        member.role = role
        if not member.gone:
            self._count()

    def join(
        self, info: control_pb2.MemberInfo, load: control_pb2.MemberLoad, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED
    ) -> Member:
        """The member, new or (same incarnation, a second stream) as it was. Its `stream` names this Join stream.

        role: that it has now; unspecified: info's.

        Raises InvalidRequest for an incomplete info or a process that a newer one has replaced, SchemaMismatch for
        another KV format than the cluster's.
        """
        self._require_valid(info, role)
        known = self.members.get(info.id)
        if known is not None and known.incarnation == info.incarnation:
            known.stream += 1
            self._heard_role(known, role)
            known.report(load)
            return known
        if known is not None:
            self._superseded.add(known.incarnation)
            self._remove(known)
        member = self.members[info.id] = Member(info, load, role or info.role)
        self._count()
        for callback in self._join_callbacks:
            callback(member)
        return member

    def leave(self, member: Member, stream: int) -> None:
        """The Join stream that was number `stream` has ended. Without effect where a newer one has taken its place."""
        if not member.gone and member.stream == stream:
            self._remove(member)

    def store_at(self, address: str) -> Member | None:
        found = (member for member in self.members.values() if member.role == "store" and member.info.address == address)
        return next(found, None)

    def snapshot(self, block_size: int, now_s: float = 0.0, busy_until: BusyUntil | None = None) -> Snapshot:
        """busy_until: of a worker that has prefills to do, on the clock of now_s, for the request to be placed; None: not asked."""
        if self._pools is None:
            self._pools = self._live(prefills), self._live(decodes)

        def states(members: list[Member]) -> tuple[MemberState, ...]:
            return tuple(
                member.state_until(busy_until(member)) if busy_until is not None and member.backlog else member.state for member in members
            )

        prefill, decode = self._pools
        return Snapshot(states(prefill), states(decode), block_size, now_s)

    def _live(self, does: Callable[[str], bool]) -> list[Member]:
        """does: what is asked of their roles. Those whose own store lives, too, by id."""
        stores = {member.info.address for member in self.members.values() if member.role == "store"}
        found = (member for member in self.members.values() if does(member.role) and member.info.store_address in stores)
        return sorted(found, key=lambda member: member.id)

    async def close(self) -> None:
        for member in list(self.members.values()):
            self._remove(member)
        await asyncio.gather(*self._closing)

    def _require_valid(self, info: control_pb2.MemberInfo, present: control_pb2.Role) -> None:
        role = ROLE_NAMES.get(info.role)
        if role is None or (present and present not in ROLE_NAMES) or not (info.id and info.incarnation and info.address):
            raise InvalidRequest(f"a member must join with a role, an id, an incarnation and an address; got {info}")
        if info.incarnation in self._superseded:
            raise InvalidRequest(f"{role} {info.id} of process {info.incarnation} has been replaced by a newer process; end this one")
        if role in WORKER_ROLES and not info.HasField("schema"):
            raise InvalidRequest(f"{role} worker {info.id} joined without a KV schema; a worker sends the one that its engine has")
        if info.HasField("schema"):
            ours = self.schema
            if ours is not None:
                ours.require_equal(KVSchema.from_proto(info.schema), "the cluster", f"{role} {info.id} ({info.address})")

    def _remove(self, member: Member) -> None:
        del self.members[member.id]
        self._count()
        member.leave()
        task = asyncio.get_running_loop().create_task(member.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _count(self) -> None:
        self._pools = None
        for role in ROLE_NAMES.values():
            self._metrics.set_members(role, sum(member.role == role for member in self.members.values()))
