"""Members that are not there: who left or was refused, and why, until they join again. For operators; nothing is decided by it."""

from __future__ import annotations

import time
from typing import NamedTuple

from ...protocol.v1 import control_pb2

MAX_ABSENCES = 64  # the oldest is forgotten first


class Absence(NamedTuple):
    info: control_pb2.MemberInfo
    why: str
    since: float  # of time.monotonic()


class Absences:
    def __init__(self) -> None:
        self._by_id: dict[str, Absence] = {}

    def note(self, info: control_pb2.MemberInfo, why: str) -> None:
        """info's member left, or was refused. Of several reasons the last counts."""
        self._by_id.pop(info.id, None)
        self._by_id[info.id] = Absence(info, why, time.monotonic())
        if len(self._by_id) > MAX_ABSENCES:
            del self._by_id[next(iter(self._by_id))]

    def joined(self, member_id: str) -> None:
        self._by_id.pop(member_id, None)

    def to_proto(self) -> list[control_pb2.StatusReply.Absence]:
        """Oldest first."""
        now = time.monotonic()
        return [control_pb2.StatusReply.Absence(info=one.info, why=one.why, for_s=now - one.since) for one in self._by_id.values()]
