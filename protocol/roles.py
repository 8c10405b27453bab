"""What a worker does: a state that can change, and not a kind of process."""

from __future__ import annotations

from typing import Literal

from .v1 import control_pb2

WorkerRole = Literal["prefill", "decode", "both"]
WORKER_ROLES: tuple[WorkerRole, ...] = ("prefill", "decode", "both")
ROLE_NAMES: dict[control_pb2.Role, Literal["prefill", "decode", "both", "store"]] = {
    control_pb2.ROLE_PREFILL: "prefill",
    control_pb2.ROLE_DECODE: "decode",
    control_pb2.ROLE_BOTH: "both",
    control_pb2.ROLE_STORE: "store",
}
ROLE_NUMBERS: dict[str, control_pb2.Role] = {name: number for number, name in ROLE_NAMES.items()}


def prefills(role: str) -> bool:
    return role in ("prefill", "both")


def decodes(role: str) -> bool:
    return role in ("decode", "both")
