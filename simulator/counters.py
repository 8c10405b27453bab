"""What a run adds up beside its requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    num_placements: int = 0
    num_role_changes: int = 0
    handoff_bytes: int = 0  # asked to be moved
    prefix_bytes: int = 0
    ssd_bytes: int = 0
