"""One step of a worker from the schedulers of its two halves. Pure: no tensor, no clock, no I/O; the caller brings the lock.

decode half   a token of each running sequence, chunks of prompts that it answers itself    first
prefill half  chunks of prompts to hand off                                                 what is left of the step's prefill tokens

Each prefill token is a wait of all who decode beside it, so StepBudget says how many there may be. The decode half's own are at most
decode.max_prefill_tokens_per_step in any case, those of a step without decode tokens prefill.max_tokens_per_step.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ..protocol.timing.step_cost import ChunkWork
from .prompt_turns import LeftS
from .sequence import Sequence, StepChunk
from .step_budget import DecodeLoad, StepBudget


class StepPart(Protocol):
    """What one half has in a step."""

    @property
    def chunks(self) -> list[StepChunk]: ...

    @property
    def sampled(self) -> list[Sequence]: ...


class DecodeQueue(Protocol):
    """The decode half's scheduler, with steps of its own kind."""

    max_prefill_tokens_per_step: int

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting_chunks(self) -> list[ChunkWork]: ...

    def arrange(self, now_s: float, left_s: LeftS) -> None: ...

    def load(self, begins_at: float, default_tpot_s: float) -> DecodeLoad: ...

    def schedule(self, budget: int | None = None) -> Any: ...

    def schedule_ahead(self, budget: int | None = None) -> Any | None: ...

    def withdraw(self, step: Any) -> None: ...


class PrefillQueue(Protocol):
    """The prefill half's."""

    block_size: int
    max_tokens_per_step: int

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting_chunks(self) -> list[ChunkWork]: ...

    def arrange(self, now_s: float, left_s: LeftS) -> None: ...

    def schedule(self, budget: int | None = None) -> Any: ...

    def withdraw(self, step: Any) -> None: ...


class CombinedStep(NamedTuple):
    decode: Any  # a StepPart with preempted, those who lost their pages to it
    prefill: StepPart | None

    @property
    def chunks(self) -> list[StepChunk]:
        """decode's first."""
        return self.decode.chunks + self.prefill.chunks if self.prefill is not None else self.decode.chunks


class CombinedScheduler:
    """Either queue may have nothing to do for ever: the steps are then those of the other one alone."""

    def __init__(self, decode: DecodeQueue, prefill: PrefillQueue, budget: StepBudget) -> None:
        self._decode = decode
        self._prefill = prefill
        self._budget = budget
        self._last_chunks: list[StepChunk] = []  # of the step that was scheduled last

    def schedule(self, now: float) -> CombinedStep | None:
        """None where nothing is to do. Every step before it has been recorded, by both halves. now: of time.monotonic()."""
        budget = self._num_tokens(now)
        decode = self._decode.schedule(min(budget, self._decode.max_prefill_tokens_per_step))
        prefill = self._prefill_part(decode.chunks, budget)
        if not (decode.chunks or decode.preempted or prefill is not None):
            return None
        return self._scheduled(CombinedStep(decode, prefill))

    def schedule_ahead(self, now: float) -> CombinedStep | None:
        """The step behind the only one that is not recorded yet, which has just begun; None where that has to wait for its record, or
        nothing is to do."""
        budget = self._num_tokens(now, self._last_chunks)
        decode = self._decode.schedule_ahead(min(budget, self._decode.max_prefill_tokens_per_step))
        if decode is None:
            return None
        prefill = self._prefill_part(decode.chunks, budget)
        return self._scheduled(CombinedStep(decode, prefill)) if decode.chunks or prefill is not None else None

    def observe(self, chunks: list[StepChunk], seconds: float) -> None:
        """What a step took. Before its record."""
        self._budget.observe(chunks, seconds)

    def expected_s(self, chunks: list[StepChunk]) -> float:
        """What such a step takes, by those that were observed. Any thread, without the lock."""
        return self._budget.seconds(chunks)

    def withdraw(self, step: CombinedStep) -> None:
        """It was scheduled ahead, and does not run after all."""
        self._decode.withdraw(step.decode)
        if step.prefill is not None:
            self._prefill.withdraw(step.prefill)

    def _num_tokens(self, now: float, before: list[StepChunk] | None = None) -> int:
        """Of both halves' chunks, once their prompts have their turns. before: of the step that runs."""
        if not (self._waiting or self._decode.num_waiting or self._prefill.num_waiting):
            return 0
        begins_at = now + self._budget.seconds(before) if before else now
        load = self._decode.load(begins_at, self._budget.default_tpot_s)
        left_s = self._budget.left_s(load)
        self._decode.arrange(now, left_s)
        self._prefill.arrange(now, left_s)
        return self._budget.num_tokens(load, self._waiting)

    @property
    def _waiting(self) -> list[ChunkWork]:
        return self._decode.waiting_chunks + self._prefill.waiting_chunks

    def _prefill_part(self, decode_chunks: list[StepChunk], budget: int) -> StepPart | None:
        """At least a block where the decode half computes no prompt itself: chunks end at block boundaries, and a smaller budget would
        never let one in."""
        if not budget:
            return None
        num_own = sum(chunk.num_tokens for chunk in decode_chunks if not chunk.is_decode)
        part = self._prefill.schedule(max(budget - num_own, 0 if num_own else self._prefill.block_size))
        return part if part.chunks else None

    def _scheduled(self, step: CombinedStep) -> CombinedStep:
        self._last_chunks = step.chunks
        return step
