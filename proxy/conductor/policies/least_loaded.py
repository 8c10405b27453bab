"""least_loaded: the workers with the fewest outstanding tokens, blind to caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..placement import Choice, PlacementRequest, Snapshot
from .base import least_outstanding


@dataclass(slots=True)
class LeastLoaded:
    name: ClassVar[str] = "least_loaded"

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        prefill, decode = least_outstanding(candidates.prefill), least_outstanding(candidates.decode)
        reason = f"{prefill.id} has the least to compute ({prefill.num_outstanding_tokens} tokens), "
        return Choice(prefill, decode, reason + f"{decode.id} holds the least ({decode.num_outstanding_tokens})")
