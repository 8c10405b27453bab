"""What an instance is set to: its pages, its steps, its role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["prefill", "decode", "coupled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    page_size: int = 128
    """Tokens; a chunk ends at a page's end."""
    max_tokens_per_step: int = 2048
    """Prefill budget of a step without a decode batch."""
    mixed_tokens_per_step: int = 512
    """Prefill budget of a step with one: the chunk size of a coupled instance."""
    step_target_s: float = 0.0
    """Above 0: the budget of a mixed step is what fits under it, and mixed_tokens_per_step is not used."""
    max_running: int = 512
    learn: bool = False
    """Predictors are told what steps took."""
