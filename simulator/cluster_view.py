"""What the conductor sees of the simulated cluster: a snapshot, made anew only where something has changed.

With reports that take their time an instance is seen as it was; what was placed on it is known at once, as in the proxy's books.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..proxy.conductor.backlog import BEHIND_ALL, QueuePlace, TaskTable, Waiting
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
        report_s: age that an instance's state may have.
    """

    def __init__(self, everyone: bool, block_size: int, with_arrivals: bool, report_s: float = 0.0) -> None:
        self.tasks = TaskTable()
        self.coming: dict[Job, Arriving] = {}  # placed, and not handed off
        self.decoding: dict[Job, float] = {}  # since when
        self._everyone = everyone
        self._block_size = block_size
        self._with_arrivals = with_arrivals
        self._report_s = report_s
        self._seen_s: dict[Instance, float] = {}  # when its state was made
        self._instances: list[Instance] = []
        self._states: dict[str, MemberState] = {}
        self._changed: set[Instance] = set()
        self._pools: tuple[Pool, Pool] | None = None
        self._rows: dict[str, int] = {}  # of the books

    def watch(self, instances: list[Instance]) -> None:
        self._instances = instances
        self._rows = {instance.name: row for row, instance in enumerate(instances)}
        self._states = {instance.name: instance.state() for instance in instances}

    def change(self, instance: Instance) -> None:
        """The instance's state is not what it was."""
        self._changed.add(instance)

    def placed_on(self, instance: Instance) -> None:
        """It is seen anew with the next snapshot, however young its state is."""
        self._seen_s.pop(instance, None)
        self._changed.add(instance)

    def change_members(self) -> None:
        """An instance came or went."""
        self._pools = None

    def snapshot(self, now_s: float, place: QueuePlace = BEHIND_ALL, work_s: float = 0.0) -> Snapshot:
        """As a request sees it that would have this place in the queues. work_s: predicted seconds of its prefill."""
        if self._changed:
            self._look(now_s)
        if self._pools is None:
            self._pools = self._make_pools()
        queues = self.tasks.queues(place, np.full(len(self._instances), work_s), now_s)
        for pool in set(self._pools):
            queues.show(pool, np.array([self._rows[name] for name in pool.roster.ids], np.int64), now_s)
        arriving, began_s = NOBODY, NEVER
        if self._with_arrivals:
            arriving, began_s = Arrivals.of(self.coming.values()), np.array(list(self.decoding.values()), np.float64)
        return Snapshot(*self._pools, self._block_size, now_s, arriving, began_s, waiting=partial(self._waiting, now_s))

    def _waiting(self, now_s: float, name: str) -> list[Waiting]:
        return self.tasks.waiting(self._rows[name], now_s)

    def _look(self, now_s: float) -> None:
        due = self._changed
        if self._report_s:
            due = {one for one in due if now_s - self._seen_s.get(one, -self._report_s) >= self._report_s}
            self._seen_s.update(dict.fromkeys(due, now_s))
        for instance in due:
            instance.report()
            self._states[instance.name] = instance.state()
        if due:
            self._pools = None
        self._changed = self._changed - due

    def _make_pools(self) -> tuple[Pool, Pool]:
        states = self._states
        live = [instance for instance in self._instances if not instance.down]
        if self._everyone:
            everyone = Pool.of(states[instance.name] for instance in live)
            return everyone, everyone
        prefill, decode = (Pool.of(states[one.name] for one in live if one.role == role) for role in ("prefill", "decode"))
        return prefill, decode
