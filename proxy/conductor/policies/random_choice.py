"""random: any worker. The baseline that others are measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Self

from ..placement import PlacementRequest, Selection, Snapshot
from .base import Policy, PolicySettings


@dataclass(slots=True)
class RandomChoice(Policy):
    rng: random.Random
    name: ClassVar[str] = "random"

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls(settings.rng)

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        prefill, decode = self.rng.choice(candidates.prefill), self.rng.choice(candidates.decode)
        return Selection(prefill, decode, f"drew {prefill.id} and {decode.id}")
