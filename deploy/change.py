"""What turns a running cluster into the one that a changed configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol.config import ClusterConfig
from ..protocol.errors import ConfigError
from ..protocol.roles import WorkerRole

APPLIED, RESTARTED, REFUSED = "applied:", "restarted:", "refused:"
"""One of them begins the line with which `halfmoon serve` ends a change; `halfmoon deploy` waits for it."""
FIXED = ("model", "proxy", "security")  # sections that a running cluster keeps


@dataclass(frozen=True, slots=True)
class Change:
    surplus: tuple[str, ...]  # ids of the workers to stop
    missing: tuple[tuple[str, WorkerRole], ...]
    restarts: bool  # a setting changed that processes read when they start

    @classmethod
    def between(cls, old: ClusterConfig, new: ClusterConfig, workers: Mapping[WorkerRole, Sequence[str]]) -> Change:
        """workers: ids of those that run, by role. Raises ConfigError for what needs a new start."""
        for section in FIXED:
            if changed := _changed(getattr(old, section), getattr(new, section)):
                keys = ", ".join(f"{section}.{key}" for key in changed)
                raise ConfigError(f"{keys} cannot change while the cluster runs; stop it and start it again")
        for section in ("prefill", "decode"):
            if getattr(old, section).tensor_parallel != getattr(new, section).tensor_parallel:
                raise ConfigError(f"{section}.tensor_parallel cannot change while the cluster runs; stop it and start it again")
        if new.decode.num_workers + new.both.num_workers < 1:
            raise ConfigError("no worker would decode; decode.num_workers or both.num_workers has to be 1 or more")
        surplus: list[str] = []
        missing: list[tuple[str, WorkerRole]] = []
        for role, ids in workers.items():
            wanted = [f"{role}-{number}" for number in range(getattr(new, role).num_workers)]
            surplus += [worker_id for worker_id in ids if worker_id not in wanted]
            missing.extend((worker_id, role) for worker_id in wanted if worker_id not in ids)
        restarts = any(set(_changed(getattr(old, name), getattr(new, name))) - {"num_workers"} for name in ("store", "prefill", "decode"))
        return cls(tuple(surplus), tuple(missing), restarts)

    def __str__(self) -> str:
        parts = [f"{worker_id} added" for worker_id, _ in self.missing] + [f"{worker_id} removed" for worker_id in self.surplus]
        if self.restarts:
            parts.append("workers and stores restarted with the new settings")
        return ", ".join(parts) or "nothing to change"


def _changed(old: Any, new: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name)]
