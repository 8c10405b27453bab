"""round_robin: each worker in turn, by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ..placement import PlacementRequest, Selection, Snapshot
from .base import Policy, PolicySettings


@dataclass(slots=True)
class RoundRobin(Policy):
    last_prefill: str = ""  # ids; the next one in order is selected, so that a join or a death skips nobody
    last_decode: str = ""
    name: ClassVar[str] = "round_robin"

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls()

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        prefill = candidates.prefill[candidates.prefill.after(self.last_prefill)]
        decode = candidates.decode[candidates.decode.after(self.last_decode)]
        self.last_prefill, self.last_decode = prefill.id, decode.id
        return Selection(prefill, decode, f"{prefill.id} and {decode.id} were next")
