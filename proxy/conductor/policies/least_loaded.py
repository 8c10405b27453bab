"""least_loaded: the workers with the fewest outstanding tokens, blind to caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ..placement import PlacementRequest, Selection, Snapshot
from .base import Policy, PolicySettings, least_outstanding


@dataclass(slots=True)
class LeastLoaded(Policy):
    name: ClassVar[str] = "least_loaded"

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls()

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        prefill, decode = least_outstanding(candidates.prefill), least_outstanding(candidates.decode)
        reason = f"{prefill.id} has the least to compute ({prefill.num_outstanding_tokens} tokens), "
        return Selection(prefill, decode, reason + f"{decode.id} holds the least ({decode.num_outstanding_tokens})")
