"""What an operator sees of the cluster: members and their load, queues, latencies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..protocol.roles import ROLE_NAMES
from ..protocol.v1 import control_pb2, inference_pb2

Role = Literal["prefill", "decode", "both", "store", "unknown"]


@dataclass(frozen=True, slots=True)
class Model:
    id: str
    max_model_len: int
    vocab_size: int
    dtype: str

    @classmethod
    def from_proto(cls, message: inference_pb2.ModelInfo) -> Model:
        return cls(message.id, message.max_model_len, message.vocab_size, message.dtype)


@dataclass(frozen=True, slots=True)
class Member:
    id: str
    role: Role
    """That it has now."""
    address: str
    node_id: str
    device: str
    pid: int
    up_s: float
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    """Role prefill: still to compute; else of context held."""
    metrics_address: str
    """Of its /metrics, "host:port"."""
    kv_usage_ratio: float
    """Share of a worker's pages, or of a store's arena, that is in use."""
    role_reason: str
    """Why the policy gave it its role; "": it began with it."""


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A worker was to take on another role."""

    member: str
    role: Role
    former: Role
    reason: str
    error: str
    """Why it kept its former role; "": it did not."""
    ago_s: float

    @classmethod
    def from_proto(cls, message: control_pb2.StatusReply.RoleChange) -> RoleChange:
        return cls(
            member=message.member,
            role=ROLE_NAMES.get(message.role, "unknown"),
            former=ROLE_NAMES.get(message.former, "unknown"),
            reason=message.reason,
            error=message.error,
            ago_s=message.ago_s,
        )


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds, over the latest `count` requests."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def from_proto(cls, message: control_pb2.StatusReply.Percentiles) -> Percentiles:
        return cls(message.p50, message.p90, message.p99, message.count)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    model: str
    up_s: float
    draining: bool
    num_queued: int
    num_running: int
    members: tuple[Member, ...]
    ttft_s: Percentiles
    tpot_s: Percentiles
    outcomes: dict[str, int]
    policy: str
    admission: str
    order: str
    prediction_errors: dict[str, float]
    """Predictor -> recent mean of |predicted - measured| / measured."""
    rejections: dict[str, int]
    """Requests refused, by what refused them ("queue" or the name of an admission)."""
    num_in_slo: int
    """Finished requests that had an SLO and met it."""
    num_outside_slo: int
    role_changes: tuple[RoleChange, ...]
    """The last ones, the latest first."""

    @classmethod
    def from_proto(cls, message: control_pb2.StatusReply) -> ClusterStatus:
        return cls(
            model=message.model,
            up_s=message.up_s,
            draining=message.draining,
            num_queued=message.num_queued,
            num_running=message.num_running,
            members=tuple(map(_member, message.members)),
            ttft_s=Percentiles.from_proto(message.ttft_s),
            tpot_s=Percentiles.from_proto(message.tpot_s),
            outcomes=dict(message.outcomes),
            policy=message.policy,
            admission=message.admission,
            order=message.order,
            prediction_errors=dict(message.prediction_errors),
            rejections=dict(message.rejections),
            num_in_slo=message.num_in_slo,
            num_outside_slo=message.num_outside_slo,
            role_changes=tuple(map(RoleChange.from_proto, message.role_changes)),
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _member(message: control_pb2.StatusReply.Member) -> Member:
    info, load = message.info, message.load
    return Member(
        id=info.id,
        role=ROLE_NAMES.get(message.role or info.role, "unknown"),
        address=info.address,
        metrics_address=info.metrics_address,
        node_id=info.node_id,
        device=info.device,
        pid=info.pid,
        up_s=message.up_s,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_outstanding_tokens=load.num_outstanding_tokens,
        kv_usage_ratio=load.kv_usage_ratio,
        role_reason=message.role_reason,
    )
