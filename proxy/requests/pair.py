"""A placement assigned to its members: which members work for a request, and how to undo what was assigned.

assigned ─► end_prefill (prefill done) ─► begin_decode (decode admitted it) ─► release (ended in any way)
Each step undoes its own part. release undoes all that is left. Every step may be taken more than once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from ..conductor.assigned_load import Assignment
from ..conductor.forecast import handoff_bytes, handoff_link
from ..conductor.placement import Placement
from ..members.member import Member
from .decisions import AttemptDecision
from .prompt import Prompt


@dataclass(slots=True, eq=False)
class Pair:
    prefill: Member
    decode: Member
    store: Member | None  # where the hand-off lies; None: the decode worker computes the prompt itself
    placement: Placement
    decided: AttemptDecision  # the placement's grounds
    prompt: Prompt
    decode_assignment: Assignment  # grows with every token
    num_loads: int  # prefixes on their way to the prefill worker when this was placed
    until_prefilled: ExitStack = field(default_factory=ExitStack)
    until_decoding: ExitStack = field(default_factory=ExitStack)  # dropped, not undone, once decode has begun
    once_decoding: ExitStack = field(default_factory=ExitStack)  # runs when decode begins
    until_released: ExitStack = field(default_factory=ExitStack)

    @property
    def is_local(self) -> bool:
        """One worker is both: the decode worker computes the prompt itself."""
        return self.placement.is_local

    @property
    def members(self) -> set[Member]:
        """Those that take part."""
        return {self.prefill, self.decode, self.store} if self.store is not None else {self.decode}

    @property
    def queue_order(self) -> int:
        """Lower is sooner in the workers' queues."""
        return self.decided.asked.place.queue_order

    @property
    def num_tokens(self) -> int:
        """To prefill."""
        return self.decided.asked.num_tokens

    @property
    def handoff_bytes(self) -> float:
        """Expected, of those that the prefill does not hide."""
        decided, placement = self.decided, self.placement
        return handoff_bytes(decided.predictors, decided.asked, placement.decode, decided.seen.block_size, placement.num_cached_tokens)

    @property
    def handoff_link(self) -> str:
        return handoff_link(self.placement.prefill, self.placement.decode)

    def end_prefill(self) -> None:
        self.until_prefilled.close()

    def begin_decode(self) -> None:
        self.end_prefill()
        self.until_decoding.pop_all()
        self.once_decoding.close()

    def release(self) -> None:
        self.until_prefilled.close()
        self.until_decoding.close()
        self.once_decoding.pop_all()
        self.until_released.close()
