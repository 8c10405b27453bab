"""round_robin: each worker in turn, by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..placement import Choice, MemberState, PlacementRequest, Snapshot


@dataclass(slots=True)
class RoundRobin:
    last_prefill: str = ""  # ids; the next one in order is chosen, so that a join or a death skips nobody
    last_decode: str = ""
    name: ClassVar[str] = "round_robin"

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        prefill = _after(self.last_prefill, candidates.prefill)
        decode = _after(self.last_decode, candidates.decode)
        self.last_prefill, self.last_decode = prefill.id, decode.id
        return Choice(prefill, decode, f"{prefill.id} and {decode.id} were next")


def _after(last: str, members: tuple[MemberState, ...]) -> MemberState:
    return min(members, key=lambda member: (member.id <= last, member.id))
