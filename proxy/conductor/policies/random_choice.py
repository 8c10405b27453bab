"""random: any worker. The baseline that others are measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..placement import Choice, PlacementRequest, Snapshot


@dataclass(slots=True)
class RandomChoice:
    rng: random.Random
    name: ClassVar[str] = "random"

    def choose(self, request: PlacementRequest, candidates: Snapshot) -> Choice:
        prefill, decode = self.rng.choice(candidates.prefill), self.rng.choice(candidates.decode)
        return Choice(prefill, decode, f"drew {prefill.id} and {decode.id}")
