"""One step of a worker from the schedulers of its two halves. Pure: no tensor, no clock, no I/O; the caller brings the lock.

decode half   a token of each running sequence, chunks of prompts that it answers itself    first, as if it were alone
prefill half  chunks of prompts to hand off                                                 what is left of the step's prefill tokens

Beside decode tokens the prefill tokens of both are bounded by decode.max_prefill_tokens_per_step, for each of them is a wait of all
who decode; without any, by prefill.max_tokens_per_step.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .sequence import StepChunk


class StepPart(Protocol):
    """What one half has in a step."""

    @property
    def chunks(self) -> list[StepChunk]: ...


class DecodeQueue(Protocol):
    """The decode half's scheduler, with steps of its own kind."""

    max_prefill_tokens_per_step: int

    def schedule(self) -> Any: ...

    def schedule_ahead(self) -> Any | None: ...

    def withdraw(self, step: Any) -> None: ...


class PrefillQueue(Protocol):
    """The prefill half's."""

    block_size: int
    max_tokens_per_step: int

    @property
    def has_runnable(self) -> bool: ...

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

    def __init__(self, decode: DecodeQueue, prefill: PrefillQueue) -> None:
        self._decode = decode
        self._prefill = prefill

    def schedule(self) -> CombinedStep | None:
        """None where nothing is to do. Every step before it has been recorded, by both halves."""
        decode = self._decode.schedule()
        prefill = self._prefill_part(decode.chunks)
        return CombinedStep(decode, prefill) if decode.chunks or decode.preempted or prefill is not None else None

    def schedule_ahead(self) -> CombinedStep | None:
        """The step behind the only one that is not recorded yet; None where that has to wait for its record, or nothing is to do."""
        decode = self._decode.schedule_ahead()
        if decode is None:
            return None
        prefill = self._prefill_part(decode.chunks)
        return CombinedStep(decode, prefill) if decode.chunks or prefill is not None else None

    def withdraw(self, step: CombinedStep) -> None:
        """It was scheduled ahead, and does not run after all."""
        self._decode.withdraw(step.decode)
        if step.prefill is not None:
            self._prefill.withdraw(step.prefill)

    def _prefill_part(self, decode_chunks: list[StepChunk]) -> StepPart | None:
        if not self._prefill.has_runnable:
            return None
        part = self._prefill.schedule(self.prefill_budget(decode_chunks))
        return part if part.chunks else None

    def prefill_budget(self, decode_chunks: list[StepChunk]) -> int:
        """Tokens that the prefill half may compute beside these. At least a block where the decode half computes no prompt itself: chunks
        end at block boundaries, and a smaller budget would never let one in."""
        own = [chunk for chunk in decode_chunks if not chunk.is_decode]
        num_own_tokens = sum(chunk.num_tokens for chunk in own)
        if len(own) == len(decode_chunks):
            return max(self._prefill.max_tokens_per_step - num_own_tokens, 0)
        return max(max(self._decode.max_prefill_tokens_per_step, self._prefill.block_size) - num_own_tokens, 0)
