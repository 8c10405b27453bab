"""The live members: prefill workers, decode workers and stores, by their Join streams.

join ─► members[id] ◄─ replaced by a newer incarnation of the same id        leave ─► gone at once, its observers called
snapshot() ─► the workers with their load, and what the live stores take     ─► Conductor
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

import numpy as np

from ...protocol.credentials import Credentials
from ...protocol.errors import DeadlineExceeded, InternalError, InvalidRequest
from ...protocol.roles import ROLE_NAMES, ROLE_NUMBERS, WORKER_ROLES, WorkerRole, decodes, prefills
from ...protocol.schema import KVSchema
from ...protocol.tasks import Tasks
from ...protocol.v1 import control_pb2
from ..conductor.backlog import BEHIND_ALL, QueuePlace, Waiting
from ..conductor.placement import Snapshot
from ..conductor.policies.base import cost_by_blocks
from ..conductor.pool import NOTHING, Ints, Pool, Roster
from ..member_metrics import MemberReport
from ..metrics import ProxyMetrics
from .absences import Absences
from .load_table import LoadTable
from .member import CLOSE_GRACE_S, STATE_ROLES, Member

JoinCallback = Callable[[Member], None]
ReportCallback = Callable[[Member, control_pb2.MemberLoad], None]
PrefixCallback = Callable[[Member, control_pb2.PrefixChange], None]
NUM_SUPERSEDED = 4096  # replaced processes to remember; older ones have ended by now


class Asking(NamedTuple):
    """What a snapshot needs to know of a request, to predict how long it would wait on each worker."""

    held_blocks: Mapping[str, int]  # store address -> leading blocks of it that are held there
    place: QueuePlace  # in the workers' queues
    work_s: Callable[[int], float]  # held blocks -> seconds of its prefill after them
    page_blocks: Mapping[str, int] = NOTHING  # worker id -> leading blocks of it that stand in its pages


BEHIND_EVERYBODY = Asking({}, BEHIND_ALL, lambda num_held: 0.0)


class Cluster:
    def __init__(self, metrics: ProxyMetrics, schema: KVSchema | None = None, credentials: Credentials | None = None) -> None:
        """schema: the one that all workers must have. None: the first worker's, for as long as there is any worker.
        credentials: that members ask the proxy for."""
        self.members: dict[str, Member] = {}
        self._metrics = metrics
        self.one_pool = False
        """Every worker is a candidate for prefill and for decode, whatever its role: the policy goes by roles itself."""
        self._given_schema = schema
        self._credentials = credentials
        self._schema: KVSchema | None = None  # of the present workers
        self._max_model_len: int | None = None  # None: to be found again
        self._max_handoff_len: int | None = None  # None: to be found again
        self._num_members: Counter[str] = Counter()  # by role
        self._table = LoadTable()
        # for prefill and decode; None: to be found again after a member came or went
        self._candidates: tuple[_Candidates, _Candidates] | None = None
        self._stores: dict[str, list[Member]] = {}  # by address
        self._superseded: dict[str, None] = {}  # incarnations that a newer process of their id has replaced, oldest first
        self._join_callbacks: list[JoinCallback] = []
        self._role_callbacks: list[JoinCallback] = []
        self._report_callbacks: list[ReportCallback] = []
        self._prefix_callbacks: list[PrefixCallback] = []
        self._closing = Tasks("cluster")
        self._telling = Tasks("cluster")
        self.absences = Absences()
        metrics.members.reports = self._reports

    @property
    def schema(self) -> KVSchema | None:
        return self._schema if self._given_schema is None else self._given_schema

    @property
    def max_model_len(self) -> int:
        """Tokens that every live worker takes; 0 without one."""
        if self._max_model_len is None:
            lens = [member.info.max_model_len for member in self.members.values() if member.role in WORKER_ROLES]
            self._max_model_len = min((length for length in lens if length > 0), default=0)
        return self._max_model_len

    @property
    def max_handoff_len(self) -> int:
        """Tokens of the largest hand-off that a live store takes; 0: there is no live store."""
        if self._max_handoff_len is None:
            stores = [store for stores in self._stores.values() for store in stores]
            self._max_handoff_len = max((store.max_handoff_len for store in stores), default=0)
        return self._max_handoff_len

    def on_join(self, callback: JoinCallback) -> None:
        """callback runs for every process that joins from now on."""
        self._join_callbacks.append(callback)

    def on_role(self, callback: JoinCallback) -> None:
        """callback runs for every worker that takes on another role from now on."""
        self._role_callbacks.append(callback)

    def on_report(self, callback: ReportCallback) -> None:
        """callback runs for every load report from now on."""
        self._report_callbacks.append(callback)

    def on_prefixes(self, callback: PrefixCallback) -> None:
        """callback runs for every change of what stands in a worker's pages, from now on."""
        self._prefix_callbacks.append(callback)

    def prefixes_changed(self, member: Member, change: control_pb2.PrefixChange) -> None:
        for callback in self._prefix_callbacks:
            callback(member, change)

    def report(self, member: Member, load: control_pb2.MemberLoad, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED) -> None:
        """role: its present one; unspecified: unchanged."""
        self._heard_role(member, role)
        member.report(load, role)
        for callback in self._report_callbacks:
            callback(member, load)

    async def set_role(self, member: Member, role: WorkerRole, timeout_s: float, reason: str = "") -> None:
        """Gives a worker a new role and returns once the worker says that it has it. Placements use the new role from the call on.

        What was placed on the worker before ends there. After any error the worker has its former role again. reason: for people. Raises
        InvalidRequest for a role that it cannot take, its own refusal, DeadlineExceeded if it does not answer, WorkerLost if it leaves,
        InternalError if it answers with another role.
        """
        if ROLE_NUMBERS[role] not in member.info.roles:
            found = ", ".join(sorted(ROLE_NAMES[number] for number in member.info.roles)) or "none but its own"
            raise InvalidRequest(f"{member.title} can't take on the role {role}; it can take {found}")
        async with member.orders.one_at_a_time:
            former = member.role
            self._change_role(member, role)
            try:
                async with asyncio.timeout(timeout_s):
                    said = await member.orders.give(control_pb2.MemberOrder(role=ROLE_NUMBERS[role]))
                if said != ROLE_NUMBERS[role]:
                    found = ROLE_NAMES.get(said, f"number {said}")
                    raise InternalError(f"{member.id} was to take on the role {role} and says that it has the role {found}")
            except TimeoutError as error:
                self._change_role(member, former)
                raise DeadlineExceeded(f"{member.title} did not say within {timeout_s:g} s that it takes on the role {role}") from error
            except BaseException:
                self._change_role(member, former)
                raise
            member.role_reason = reason

    def _heard_role(self, member: Member, role: control_pb2.Role) -> None:
        """Follows the reported role: a worker may take one on after its order timed out. Raises InvalidRequest for an unknown role."""
        if role not in (control_pb2.ROLE_UNSPECIFIED, *ROLE_NAMES):
            raise InvalidRequest(f"{member.title} reports role number {role}, which this proxy does not know; run one version on both")
        if role and ROLE_NAMES[role] != member.role and not member.orders.pending:
            self._change_role(member, ROLE_NAMES[role])
            member.role_reason = ""

    def _change_role(self, member: Member, role: str) -> None:
        former, member.role = member.role, role
        if not member.gone:
            self._count(former, -1)
            self._count(role, 1)
            self._metrics.members.took_role(member.id, role)
            for callback in self._role_callbacks:
                callback(member)

    def join(
        self, info: control_pb2.MemberInfo, load: control_pb2.MemberLoad, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED
    ) -> Member:
        """Returns a new member, or the known one for a further stream of one incarnation. Its `stream` numbers this Join stream.

        role: its present one; unspecified: info's.

        Raises InvalidRequest for an incomplete info or for a process that a newer one has replaced, SchemaMismatch for a KV format
        other than the cluster's.
        """
        self._require_valid(info, role)
        known = self.members.get(info.id)
        if known is not None and known.incarnation == info.incarnation:
            known.stream += 1
            self._heard_role(known, role)
            known.report(load, role)
            return known
        if known is not None:
            self._superseded[known.incarnation] = None
            if len(self._superseded) > NUM_SUPERSEDED:
                del self._superseded[next(iter(self._superseded))]
            self._remove(known)
        member = self.members[info.id] = Member(info, load, role or info.role, self._table, self._credentials)
        if member.role == "store":
            self._stores.setdefault(member.address, []).append(member)
            self._stores_changed()
        elif self._schema is None:
            self._schema = member.schema
        self._count(member.role, 1)
        self.absences.joined(member.id)
        self._metrics.members.joined(member.id, member.role)
        for callback in self._join_callbacks:
            callback(member)
        return member

    def acceptance(self, member: Member) -> control_pb2.MemberOrder:
        """The first order on a Join stream. A store learns from it which stores there are."""
        return control_pb2.MemberOrder(accepted=True, stores=self._member_stores() if member.role == "store" else None)

    def _member_stores(self) -> control_pb2.MemberStores:
        return control_pb2.MemberStores(addresses=sorted(self._stores))

    def _stores_changed(self) -> None:
        for store in [store for stores in self._stores.values() for store in stores]:
            order = control_pb2.MemberOrder(stores=self._member_stores())
            self._telling.spawn(store.orders.tell(order), f"telling {store.id} which stores there are")

    def leave(self, member: Member, stream: int) -> None:
        """The Join stream with number `stream` has ended. Does nothing if a newer stream has replaced it."""
        if not member.gone and member.stream == stream:
            self._remove(member)

    def lose(self, member: Member, reason: str) -> None:
        """The proxy leaves a member that makes no progress. reason: follows "<member> is gone:"."""
        member.left_because = reason
        if not member.gone:
            self._remove(member)

    def avoid(self, member: Member, avoided: bool) -> None:
        """Whether it gets new requests only where there is no other one, or is such a store's worker."""
        if member.avoided != avoided:
            member.avoided = avoided
            self._candidates = None

    def store_at(self, address: str) -> Member | None:
        found = self._stores.get(address)
        return found[0] if found else None

    def store_for(self, num_tokens: int, addresses: Sequence[str]) -> Member | None:
        """A live store that takes a hand-off of num_tokens: the first of these addresses, else the emptiest of all. None: there is none."""
        for address in addresses:
            store = self.store_at(address)
            if store is not None and num_tokens <= store.max_handoff_len:
                return store
        fitting = [store for store, *_ in self._stores.values() if num_tokens <= store.max_handoff_len]
        return min(fitting, key=lambda store: (store.avoided, store.load.kv_usage_ratio, store.id), default=None)

    @property
    def store_addresses(self) -> Set[str]:
        return self._stores.keys()

    @property
    def prefill_stores(self) -> Sequence[str]:
        """The stores beside the workers that prefill; the same object until somebody comes or goes."""
        return self._prefilling().roster.stores[0]

    def store_loads(self) -> dict[str, int]:
        """The stores on the nodes of workers that prefill, or may -> tokens that those workers have before them."""
        roster, rows = self._prefilling()
        addresses, having, places = roster.stores
        tokens = np.bincount(places, self._table.outstanding_tokens(rows[having]), len(addresses))
        return dict(zip(addresses, tokens.astype(np.int64).tolist(), strict=True))

    def _prefilling(self) -> _Candidates:
        prefill, decode = self._live_candidates()
        return prefill if len(prefill.rows) else decode

    def snapshot(self, block_size: int, now_s: float = 0.0, asking: Asking | None = None) -> Snapshot:
        """asking None: shows the workers as if no prefill were waiting."""
        candidates = self._live_candidates()
        if self.one_pool:
            prefill = decode = self._pools(candidates[:1], asking, now_s)[0]
        else:
            prefill, decode = self._pools(candidates, asking, now_s)
        waiting = partial(self._waiting, now_s)
        return Snapshot(prefill, decode, block_size, now_s, max_handoff_len=self.max_handoff_len, waiting=waiting)

    def _waiting(self, now_s: float, worker_id: str) -> list[Waiting]:
        return self._table.tasks.waiting(self.members[worker_id].row, now_s)

    def workers(self, block_size: int, now_s: float) -> Snapshot:
        """All workers in either pool, behind everything that was placed on them: what a decision about roles is made on."""
        everyone = self._pools([self._live(_works)], BEHIND_EVERYBODY, now_s)[0]
        return Snapshot(everyone, everyone, block_size, now_s, max_handoff_len=self.max_handoff_len)

    def _pools(self, candidates: Sequence[_Candidates], asking: Asking | None, now_s: float) -> list[Pool]:
        pools = [self._table.pool(found.roster, found.rows) for found in candidates]
        if asking is not None and len(self._table.tasks):
            self._show_queues(pools, candidates, asking, now_s)
        return pools

    def _show_queues(self, pools: list[Pool], candidates: Sequence[_Candidates], asking: Asking, now_s: float) -> None:
        """What is before this request, and after it, by its place in each queue."""
        tasks = self._table.tasks
        has_task = np.zeros(self._table.size, np.bool_)
        has_task[tasks.rows] = True
        work_s = np.zeros(self._table.size)
        for pool, (_, rows) in zip(pools, candidates, strict=True):
            if has_task[rows].any():
                pool.num_page_blocks = pool.in_pages(asking.page_blocks)
                pool.num_held_blocks = pool.held(asking.held_blocks, asking.page_blocks)
                work_s[rows] = cost_by_blocks(pool.num_held_blocks, asking.work_s)
        queues = tasks.queues(asking.place, work_s, now_s)
        for pool, (_, rows) in zip(pools, candidates, strict=True):
            queues.show(pool, rows, now_s)

    def _live_candidates(self) -> tuple[_Candidates, _Candidates]:
        """Candidates for prefill and for decode."""
        if self._candidates is None:
            everyone = self._live(_works) if self.one_pool else None
            self._candidates = (everyone, everyone) if everyone is not None else (self._live(prefills), self._live(decodes))
        return self._candidates

    def _live(self, does: Callable[[str], bool]) -> _Candidates:
        """Workers whose role satisfies does, those that prefill first, by id. Those that are avoided only if all are."""
        members = [member for member in self.members.values() if does(member.role)]
        members = [member for member in members if not self._is_avoided(member)] or members
        members.sort(key=lambda member: (not prefills(member.role), member.id))  # of equal predictions the first one is taken
        roster = Roster(
            [member.id for member in members],
            [member.incarnation for member in members],
            [member.store_address if member.store_address in self._stores else "" for member in members],
            [STATE_ROLES.get(member.role, member.role) for member in members],
            [member.limits for member in members],
        )
        return _Candidates(roster, np.array([member.row for member in members], np.int64))

    def _is_avoided(self, worker: Member) -> bool:
        stores = self._stores.get(worker.store_address)
        return worker.avoided or (stores is not None and stores[0].avoided)

    async def close(self) -> None:
        for member in list(self.members.values()):
            self._remove(member)
        await self._telling.close()
        await self._closing.close(grace_s=2 * CLOSE_GRACE_S)

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
        if member.role == "store":
            self._stores[member.address].remove(member)
            if not self._stores[member.address]:
                del self._stores[member.address]
            self._stores_changed()
        else:
            self._schema = next((other.schema for other in self.members.values() if other.role in WORKER_ROLES), None)
        self._count(member.role, -1)
        self.absences.note(member.info, member.why_gone)
        self._metrics.members.left(member.id, member.role)
        member.leave()
        self._closing.spawn(member.close(), f"closing the channel to {member.title}")

    def _reports(self) -> list[MemberReport]:
        """Any thread."""
        return [MemberReport(one.id, one.silent_s, one.load.num_outstanding_tokens) for one in list(self.members.values())]

    def _count(self, role: str, change: int) -> None:
        self._candidates = self._max_model_len = self._max_handoff_len = None
        self._num_members[role] += change
        for role in ROLE_NAMES.values():
            self._metrics.members.set_members(role, self._num_members[role])


def _works(role: str) -> bool:
    return role in WORKER_ROLES


class _Candidates(NamedTuple):
    roster: Roster
    rows: Ints  # of the table
