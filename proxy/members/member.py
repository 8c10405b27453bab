"""One process of the cluster, as the proxy knows it from its Join stream: who it is, its load, a channel to it, its end.

Join ─► Member ── report ─► load ...
          └── leave ─► every on_gone callback, at once; the channel closes
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from ...protocol.channel import open_channel
from ...protocol.roles import ROLE_NAMES
from ...protocol.schema import KVSchema
from ...protocol.v1 import control_pb2, kvstore_pb2_grpc, worker_pb2_grpc
from ..conductor.placement import MemberState
from .assigned_load import AssignedLoad
from .backlog import Backlog
from .orders import OrderBook
from .token_feed import TokenFeed

STATE_ROLES = {"both": "coupled"}  # as the Conductor calls it
CLOSE_GRACE_S = 1.0  # for calls that are being cancelled

GoneCallback = Callable[["Member"], None]


class Member:
    """Made in a running event loop (its channel belongs to it). role: as a number of the protocol, what it has now."""

    def __init__(self, info: control_pb2.MemberInfo, load: control_pb2.MemberLoad, role: control_pb2.Role) -> None:
        self.info = info
        # asked for at every placement, and an attribute of a message is slow
        self._id, self._incarnation, self.store_address, self._kv_capacity_tokens = (
            info.id, info.incarnation, info.store_address, info.kv_capacity_tokens,
        )  # fmt: skip
        self._context = AssignedLoad()  # tokens of context, of what it decodes or will
        self.backlog = Backlog(AssignedLoad(), shares=False)  # prompts that it computes, its own or to hand off
        self._set_role(ROLE_NAMES[role])
        self.num_loads = 0  # prefixes that it is to load, of prefills not done
        self.schema = KVSchema.from_proto(info.schema) if info.HasField("schema") else None
        self.stream = 0  # which of its process's Join streams is the present one
        self.orders = OrderBook(self)
        self.gone = False
        self._joined = time.monotonic()
        self._channel = open_channel(info.address)
        # typed Any: the generated stubs carry no types
        self.prefill_worker: Any = worker_pb2_grpc.PrefillWorkerStub(self._channel)
        self.decode_worker: Any = worker_pb2_grpc.DecodeWorkerStub(self._channel)
        self.token_feed = TokenFeed(self.decode_worker, self.title, self._id)
        self.store: Any = kvstore_pb2_grpc.KVStoreStub(self._channel)
        self._gone_callbacks: dict[int, GoneCallback] = {}
        self._numbers = itertools.count()
        self._state: MemberState | None = None
        self._state_version = -1
        self.report(load)

    @property
    def id(self) -> str:
        return self._id

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
        """What runs ends where it is, and in the books that it was written in."""
        self._set_role(role)
        self._state = None

    def _set_role(self, role: str) -> None:
        self._role = role
        self.backlog.shares = role != "decode"

    @property
    def assigned(self) -> AssignedLoad:
        """Role prefill: tokens to compute; else of context."""
        return self.backlog.assigned if self._role == "prefill" else self._context

    def report(self, load: control_pb2.MemberLoad) -> None:
        self.load = load
        self.assigned.report(load.num_outstanding_tokens)
        if self._role != "prefill":
            self.backlog.assigned.report(load.num_prefill_tokens)
        self.backlog.report(time.monotonic())

    @property
    def state(self) -> MemberState:
        """Without a prefill to do; state_until tells of one that has some."""
        if self._state is None or self._state_version != self.assigned.version:
            self._state, self._state_version = self.state_until(0.0), self.assigned.version
        return self._state

    def state_until(self, busy_until_s: float) -> MemberState:
        # a prefill worker counts its prompt down chunk by chunk; what a decode worker holds, the proxy knows to the token
        assigned = self.assigned
        return MemberState(
            self._id,
            self._incarnation,
            self.store_address,
            assigned.num_left_tokens if self._role == "prefill" else assigned.num_tokens,
            self._kv_capacity_tokens,
            busy_until_s,
            assigned.num_requests,
            assigned.num_running,
            assigned.num_running_tokens,
            STATE_ROLES.get(self._role, self._role),
        )

    def on_gone(self, callback: GoneCallback) -> Callable[[], None]:
        """callback runs when the member leaves. Returns what takes it back."""
        number = next(self._numbers)
        self._gone_callbacks[number] = callback
        return lambda: self._gone_callbacks.pop(number, None) and None

    def leave(self) -> None:
        self.gone = True
        self.orders.closed()
        callbacks, self._gone_callbacks = self._gone_callbacks, {}
        for callback in callbacks.values():
            callback(self)

    async def close(self) -> None:
        self.token_feed.close()
        await self._channel.close(CLOSE_GRACE_S)
