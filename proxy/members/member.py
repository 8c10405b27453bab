"""One process of the cluster as its Join stream shows it: its identity, its load, a channel to it, its end.

Join ─► Member ── report ─► load ...
          └── leave ─► every on_gone callback, at once; the channel closes
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from ...protocol.channel import open_channel
from ...protocol.credentials import Credentials
from ...protocol.errors import WorkerLost
from ...protocol.roles import ROLE_NAMES
from ...protocol.schema import KVSchema
from ...protocol.timing.step_limits import DEFAULT_LIMITS, StepLimits
from ...protocol.v1 import control_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from ..conductor.assigned_load import AssignedLoad
from ..conductor.backlog import Backlog
from ..conductor.member_state import MemberState
from ..conductor.placement import NO_BOUND
from .load_table import LoadRow, LoadTable
from .orders import Orders
from .token_feed import TokenFeed

STATE_ROLES = {"both": "coupled"}  # as the Conductor calls it
CLOSE_GRACE_S = 1.0  # for calls that are being cancelled

GoneCallback = Callable[["Member"], None]


class Member:
    """Made in a running event loop, to which its channel belongs. It has a row of the table until it leaves.

    role: its present role, as the protocol's number. credentials: that it asks the proxy for.
    """

    def __init__(
        self,
        info: control_pb2.MemberInfo,
        load: control_pb2.MemberLoad,
        role: control_pb2.Role,
        table: LoadTable,
        credentials: Credentials | None = None,
    ) -> None:
        self.info = info
        # read often, and a message's fields are slow to read
        self._id, self._incarnation, self.address, self.store_address = info.id, info.incarnation, info.address, info.store_address
        self._kv_capacity_tokens = info.kv_capacity_tokens
        self.row = row = table.enter(self._load_row)
        self._table = table
        self.context = AssignedLoad(lambda: table.changed(row))  # tokens that it decodes behind, now or later, whatever its role
        # prompts that it computes, for itself or to hand off
        self.backlog = Backlog(AssignedLoad(lambda: table.changed(row)), shares=False, table=table.tasks, row=row)
        self._set_role(ROLE_NAMES[role])
        self.limits = _limits(info)
        self.num_loads = 0  # prefixes to load, of prefills that are not done
        self.schema = KVSchema.from_proto(info.schema) if info.HasField("schema") else None
        self.stream = 0  # number of its process's present Join stream
        self.orders = Orders(self)
        self.gone = False
        self.left_because = ""  # where it was the proxy that left it
        self.silent_s = 0.0  # since its last report, as Liveness counts
        self.role_reason = ""  # why it was given the role that it has; "": it began with it, or took it on by itself
        self.avoided = False  # no new requests, where there are others
        self.broken = control_pb2.Broken()  # as it says itself, before it leaves
        self._joined = time.monotonic()
        self._channel = open_channel(info.address, credentials)
        # typed Any: the generated stubs carry no types
        self.decode_worker: Any = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        # with a request that is bytes already: a prompt is serialised once, in parts
        self.start_prefill: Any = self._channel.unary_unary(
            "/halfmoon.v1.PrefillWorker/Prefill", response_deserializer=worker_pb2.PrefillReply.FromString
        )
        self.start_prefill_with_logprobs: Any = self._channel.unary_stream(
            "/halfmoon.v1.PrefillWorker/PrefillWithLogprobs", response_deserializer=worker_pb2.PrefillReply.FromString
        )
        self.start_decode: Any = self._channel.unary_stream(
            "/halfmoon.v1.DecodeWorker/Decode", response_deserializer=worker_pb2.DecodeReply.FromString
        )
        self.token_feed = TokenFeed(self.decode_worker, self.title, self._id)
        self.store: Any = kvstore_pb2_grpc.KVStoreStub(self._channel)
        self._gone_callbacks: dict[int, GoneCallback] = {}
        self._numbers = itertools.count()
        self.report(load, role)

    @property
    def id(self) -> str:
        return self._id

    @property
    def max_handoff_len(self) -> int:
        """Tokens of the largest hand-off that a store's arena takes; one that does not say is taken for large enough."""
        return self._kv_capacity_tokens or NO_BOUND

    @property
    def incarnation(self) -> str:
        return self._incarnation

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.role} {'' if self.role == 'store' else 'worker '}{self.id} ({self.info.address})"

    @property
    def up_s(self) -> float:
        return time.monotonic() - self._joined

    @property
    def role(self) -> str:
        return self._role

    @role.setter
    def role(self, role: str) -> None:
        """What was assigned before stays assigned until it ends."""
        self._set_role(role)
        self._table.changed(self.row)

    def _set_role(self, role: str) -> None:
        self._role = role
        self.backlog.share(role != "decode")

    def report(self, load: control_pb2.MemberLoad, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED) -> None:
        """role: that the load is to be read by; unspecified: the present one. An order that changes it may be on its way."""
        self.load = load
        self.silent_s = 0.0
        prefills_alone = (ROLE_NAMES[role] if role else self._role) == "prefill"
        self.backlog.assigned.report(load.num_outstanding_tokens if prefills_alone else load.num_prefill_tokens)
        self.backlog.report(time.monotonic())

    @property
    def state(self) -> MemberState:
        """As the Conductor sees it, without the prefills that it has to do."""
        tokens, capacity, num_requests, num_running, running_tokens = self._load_row()
        return MemberState(
            self._id,
            self._incarnation,
            self.store_address,
            tokens,
            capacity,
            num_requests=num_requests,
            num_running=num_running,
            num_running_tokens=running_tokens,
            role=STATE_ROLES.get(self._role, self._role),
            limits=self.limits,
        )

    def _load_row(self) -> LoadRow:
        # a prefill worker counts down its prompts chunk by chunk; the proxy itself knows every token that a decode worker holds
        context = self.context
        return LoadRow(
            self.backlog.assigned.num_left_tokens if self._role == "prefill" else context.num_tokens,
            self._kv_capacity_tokens,
            context.num_requests,
            context.num_running,
            context.num_running_tokens,
        )

    def lost(self, request_id: str) -> WorkerLost:
        """What a request on it fails with once it is gone."""
        gone = f"{self.title} is gone: {self.why_gone}"
        if not self.broken.reason:
            return WorkerLost(gone, worker=self._id)
        return WorkerLost(gone, worker=self._id, in_step=request_id in self.broken.request_ids)

    @property
    def why_gone(self) -> str:
        """Follows "<member> is gone:"."""
        return f"it broke: {self.broken.reason}" if self.broken.reason else self.left_because or "it left the cluster"

    def on_gone(self, callback: GoneCallback) -> Callable[[], None]:
        """callback runs when the member leaves. Returns a function that removes the callback."""
        number = next(self._numbers)
        self._gone_callbacks[number] = callback
        return lambda: self._gone_callbacks.pop(number, None) and None

    def leave(self) -> None:
        self.gone = True
        self.orders.closed()
        self.backlog.leave_table()
        self._table.leave(self.row)
        callbacks, self._gone_callbacks = self._gone_callbacks, {}
        for callback in callbacks.values():
            callback(self)

    async def close(self) -> None:
        self.token_feed.close()
        await self._channel.close(CLOSE_GRACE_S)


def _limits(info: control_pb2.MemberInfo) -> StepLimits:
    """One that says nothing of them has the defaults."""
    if not info.HasField("step_limits"):
        return DEFAULT_LIMITS
    told = info.step_limits
    return StepLimits(told.max_tokens, told.max_tokens_beside, told.tpot_target_s)
