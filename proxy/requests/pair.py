"""A placement that is in the books: the members that work for a request, and everything that is to be undone at its end.

booked ─► end_prefill (prefill done) ─► begin_decode (decode admitted it) ─► release (ended, however)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..conductor.load_tracker import LoadTracker
from ..conductor.placement import Placement
from ..members.assigned_load import Assignment
from ..members.backlog import PrefillTask
from ..members.member import Member
from ..prefixes.index import PrefixIndex
from .decisions import RequestDecision


@dataclass(slots=True, eq=False)
class Pair:
    prefill: Member
    decode: Member
    store: Member  # on the decode worker's node, where the hand-off lies
    placement: Placement
    prefill_task: PrefillTask  # ends when the prefill is done
    decode_assignment: Assignment  # ends with the attempt
    load_tracker: LoadTracker
    decision: RequestDecision
    num_tokens: int  # to prefill
    admitted: bool  # for good: no admission is asked when its prefill is done
    queue_order: int  # its place in the workers' queues
    index: PrefixIndex  # where its blocks are promised
    block_keys: list[bytes]
    num_loads: int  # prefixes on their way to the prefill worker when this was placed
    handoff_bytes: int  # expected
    handoff_link: str
    released: bool = False

    @property
    def is_local(self) -> bool:
        """prefill is decode, and computes the prompt itself."""
        return self.placement.is_local

    @property
    def loads(self) -> bool:
        """Whether a prefix is to be loaded."""
        return self.placement.num_cached_tokens > 0

    @property
    def stores(self) -> set[str]:
        """Where its blocks will stand: pushed to the decode worker's, kept in the prefill worker's."""
        return {self.placement.prefill.store_address, self.placement.decode.store_address}

    def end_prefill(self) -> None:
        if not self.prefill_task.assignment.ended:
            self.prefill_task.end()
            self.prefill.num_loads -= self.loads

    def begin_decode(self) -> None:
        self.end_prefill()
        self.decode_assignment.begin()
        self.load_tracker.began(self, time.monotonic())

    def release(self) -> None:
        """Once; further calls change nothing."""
        if self.released:
            return
        self.released = True
        self.end_prefill()
        if not self.decode_assignment.running:
            for address in self.stores:  # nothing stands there, or the store has said so itself
                self.index.withdraw(address, self.block_keys)
        self.decode_assignment.end()
        self.load_tracker.left(self)
