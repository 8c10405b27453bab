"""What the conductor sees of the simulated cluster: a snapshot, made anew only where something has changed."""

from __future__ import annotations

import numpy as np

from ..proxy.conductor.member_state import MemberState
from ..proxy.conductor.placement import NEVER, NOBODY, Arrivals, Arriving, Snapshot
from ..proxy.conductor.pool import Pool
from .instance import Instance
from .job import Job


class ClusterView:
    """
    Args:
        everyone: both pools hold all instances, for they change roles, or have both.
        block_size: tokens.
        with_arrivals: snapshots tell who arrives at decode, and since when those decode who do.
    """

    def __init__(self, everyone: bool, block_size: int, with_arrivals: bool) -> None:
        self.coming: dict[Job, Arriving] = {}  # placed, and not handed off
        self.decoding: dict[Job, float] = {}  # since when
        self._everyone = everyone
        self._block_size = block_size
        self._with_arrivals = with_arrivals
        self._instances: list[Instance] = []
        self._states: dict[str, MemberState] = {}
        self._changed: set[Instance] = set()
        self._pools: tuple[Pool, Pool] | None = None

    def watch(self, instances: list[Instance]) -> None:
        self._instances = instances
        self._states = {instance.name: instance.state() for instance in instances}

    def change(self, instance: Instance) -> None:
        """The instance's state is not what it was."""
        self._changed.add(instance)

    def change_members(self) -> None:
        """An instance came or went."""
        self._pools = None

    def snapshot(self, now_s: float) -> Snapshot:
        if self._changed:
            for instance in self._changed:
                self._states[instance.name] = instance.state()
            self._changed.clear()
            self._pools = None
        if self._pools is None:
            self._pools = self._make_pools()
        arriving, began_s = NOBODY, NEVER
        if self._with_arrivals:
            arriving, began_s = Arrivals.of(self.coming.values()), np.array(list(self.decoding.values()), np.float64)
        return Snapshot(*self._pools, self._block_size, now_s, arriving, began_s)

    def _make_pools(self) -> tuple[Pool, Pool]:
        states = self._states
        live = [instance for instance in self._instances if not instance.down]
        if self._everyone:
            everyone = Pool.of(states[instance.name] for instance in live)
            return everyone, everyone
        prefill, decode = (Pool.of(states[one.name] for one in live if one.role == role) for role in ("prefill", "decode"))
        return prefill, decode
