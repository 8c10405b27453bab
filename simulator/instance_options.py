"""What an instance is set to: its pages, its steps, its role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..protocol.timing.chunk_sizer import ChunkSizer
from ..protocol.timing.step_cost import StepCost
from ..protocol.timing.step_limits import StepLimits

Role = Literal["prefill", "decode", "coupled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    page_size: int = 128
    """Tokens."""
    block_size: int = 512
    """Tokens that a cached block holds."""
    max_tokens_per_step: int = 2048
    """Prefill budget of a step without a decode batch."""
    chunk_tokens: int = 0
    """Prefill budget of a step with one; 0: as large as tpot_s allows, up to max_tokens_per_step."""
    tpot_s: float = math.inf
    """Of every request: what chunks are sized by."""
    knows: StepCost
    """What the instance thinks of its steps."""
    max_running: int = 512
    step_jitter: float = 0.0
    """Deviation of the logarithm of a step's seconds."""
    learn: bool = False
    """Predictors, and the instance's own fit, are told what steps took."""

    @property
    def sizer(self) -> ChunkSizer:
        return self.limits.sizer()

    @property
    def limits(self) -> StepLimits:
        """As a worker announces them."""
        target_s = self.tpot_s if math.isfinite(self.tpot_s) and not self.chunk_tokens else 0.0
        return StepLimits(self.max_tokens_per_step, self.chunk_tokens or self.max_tokens_per_step, target_s)

    @property
    def step_tpot_s(self) -> float:
        """The TPOT that chunks are sized by; inf where their size is given."""
        return math.inf if self.chunk_tokens else self.tpot_s
