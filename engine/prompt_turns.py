"""The order in which one queue of a worker computes its prompts. Pure: no tensor, no clock, no I/O; the caller brings the lock.

entries whose first token is due at some moment ─arrange─► entry.turn, entry.late; all others keep their places, before those
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from ..protocol.timing.step_cost import ChunkWork
from ..protocol.timing.turns import LONG_STEPS, Turn, arrange, long_overdue
from .sequence import Sequence

LATE_SPARE = 4  # one part of so many of all pages, that prompts which are late leave free
AGAIN_S = 0.05  # after which prompts that neither came nor went are arranged anew: they are partly computed, and nearer to be due

LeftS = Callable[[ChunkWork], float]  # seconds of the worker that a prompt still takes


class WaitingPrompt(Protocol):
    sequence: Sequence
    order: tuple[int, int]  # queue_order, arrival
    turn: tuple[int, ...]  # what prompts are sorted by
    late: bool


class PromptTurns:
    """changed: prompts have come or gone since they were arranged."""

    def __init__(self) -> None:
        self.changed = False
        self._arranged_s = -math.inf
        self._num_arrangements = 0

    def arrange(self, prompts: Iterable[tuple[WaitingPrompt, ChunkWork]], now_s: float, left_s: LeftS) -> bool:
        """Gives them their turns. False where all keep those that they have; prompts may not have been looked at then.

        Args:
            now_s: of the clock of Sequence.due.
            left_s: of a prompt, or the part of one that is left.
        """
        if not self.changed and now_s < self._arranged_s + AGAIN_S:
            return False
        self.changed, self._arranged_s = False, now_s
        due = [(entry, work) for entry, work in prompts if math.isfinite(entry.sequence.prompt_due)]
        if not due:
            return False
        turns = [Turn(entry.order, entry.sequence.due, left_s(work), entry.sequence.priority) for entry, work in due]
        arrangement = arrange(turns, now_s)
        self._num_arrangements += 1
        first = long_overdue(turns, arrangement, now_s) if self._num_arrangements % LONG_STEPS == 0 else []
        late = set(arrangement.order[arrangement.num_in_time :])
        order = [*first, *(index for index in arrangement.order if index not in first)]
        for rank, index in enumerate(order):
            entry = due[index][0]
            entry.turn, entry.late = (1, rank), index in late
        return True


def turn_of(sequence: Sequence, order: tuple[int, int]) -> tuple[int, ...]:
    """Until it is arranged."""
    return (0 if math.isinf(sequence.prompt_due) else 1, *order)
