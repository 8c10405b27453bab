"""Which prompts make the next step of a prefill worker. Pure: no tensor, no clock, no I/O; the caller brings the lock.

add ─► waiting ─start─► started ─ready─► runnable ─schedule─► step ─record─► finished ─release─► pages free
                 pages    its prefix      shares the token              its blocks are
                          is loaded       budget of every step          pushed from the pages

abort at any point takes a sequence out; its pages are free once it is out of the running step and released.
"""

from __future__ import annotations

import itertools
from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.page_allocator import PageAllocator
from ..engine.prompt_turns import LATE_SPARE, LeftS, PromptTurns, turn_of
from ..engine.sequence import Sequence, StepChunk
from ..protocol.blocks import div_ceil
from ..protocol.errors import ConfigError, PromptTooLong
from ..protocol.timing.step_cost import ChunkWork


class Step(NamedTuple):
    chunks: list[StepChunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """Whose next token the step's logits give, in the logits' order. To be read before record()."""
        return [chunk.sequence for chunk in self.chunks if chunk.is_last]


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    order: tuple[int, int]  # queue_order, arrival
    turn: tuple[int, ...]  # see PromptTurns
    late: bool = False
    held: bool = False  # the caller may read and write the pages: from start() to release()
    runnable: bool = False
    num_steps: int = 0  # scheduled and not recorded yet, that it is in
    num_pending: int = 0  # tokens that those compute
    left: bool = False  # finished or aborted


class PrefillScheduler:
    """Prompts start in turn, each with pages for the whole of it; none overtakes, so a long one is not starved. Turns are queue orders,
    then arrival; or what arrange() makes of them, where first tokens are due.

    Among equal turns a step's budget is shared evenly (what one does not need goes to the others, earliest first), so a long prompt
    does not starve short ones. Later turns get what is left.

    Args:
        max_tokens_per_step: at least block_size (ConfigError), for chunks end at block boundaries except a prompt's last.

    Attributes:
        num_reserved_pages: that its prompts leave to others of the allocator, unless one alone needs more than the rest.
        chunk_alignment: tokens; chunks end at a multiple of it but for a prompt's last. A block, so that blocks are pushed whole.
    """

    def __init__(self, allocator: PageAllocator, block_size: int, max_tokens_per_step: int) -> None:
        if max_tokens_per_step < block_size:
            raise ConfigError(
                f"prefill.max_tokens_per_step is {max_tokens_per_step}; it must be at least the block size, {block_size}",
                key="prefill.max_tokens_per_step",
            )
        self.allocator = allocator
        self.block_size = block_size
        self.max_tokens_per_step = max_tokens_per_step
        self.num_reserved_pages = 0
        self.chunk_alignment = block_size
        self._num_pages = 0  # of its prompts
        self._turns = PromptTurns()
        self._arrivals = itertools.count()
        self._entries: dict[Sequence, _Entry] = {}  # until the pages are free
        self._waiting: list[_Entry] = []  # both sorted by turn
        self._started: list[_Entry] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Started and not finished."""
        return len(self._started)

    @property
    def waiting_chunks(self) -> list[ChunkWork]:
        """What the next step's chunks are of, in their order."""
        waiting: list[ChunkWork] = []
        for entry in self._started:
            if entry.runnable and _num_missing(entry):
                waiting.append(_work(entry))
        return waiting

    @property
    def num_outstanding_tokens(self) -> int:
        """Still to compute, of prompts waiting and started."""
        entries = itertools.chain(self._waiting, self._started)
        return sum(entry.sequence.num_tokens - entry.sequence.num_computed_tokens for entry in entries)

    @property
    def at_rest(self) -> bool:
        """Nothing is known of any sequence, and so every page is free."""
        return not self._entries

    def check(self, sequence: Sequence) -> None:
        """Raises PromptTooLong where the sequence could never start."""
        limit = self.allocator.num_pages * self.block_size
        if sequence.num_tokens > limit:
            raise PromptTooLong(
                f"the prompt has {sequence.num_tokens} tokens; this prefill worker's pages hold {limit} (raise prefill.kv_capacity_tokens)",
                num_tokens=sequence.num_tokens,
                limit=limit,
            )

    def add(self, sequence: Sequence) -> None:
        """Raises PromptTooLong."""
        self.check(sequence)
        order = sequence.queue_order, next(self._arrivals)
        entry = _Entry(sequence, order, turn_of(sequence, order))
        self._entries[sequence] = entry
        self._turns.changed = True
        insort(self._waiting, entry, key=_turn)

    def arrange(self, now_s: float, left_s: LeftS) -> None:
        """Prompts that are due get turns by that: those started, and those that wait for pages. See PromptTurns."""
        prompts = ((entry, _work(entry)) for entry in itertools.chain(self._started, self._waiting))
        if self._turns.arrange(prompts, now_s, left_s):
            self._started.sort(key=_turn)
            self._waiting.sort(key=_turn)

    def start(self) -> list[Sequence]:
        """Gives pages to the waiting, in turn, for as long as they are there. The caller loads prefixes, then calls ready().

        Who is late anyway leaves a part of the pages to those who are not.

        Leading blocks that are here count as computed: nothing is to be loaded into their pages, the first
        num_computed_tokens // block_size.
        """
        started: list[Sequence] = []
        while self._waiting:
            entry = self._waiting[0]
            num_pages = div_ceil(entry.sequence.num_tokens, self.block_size)
            spare = self.allocator.num_pages // LATE_SPARE if entry.late and self._started else 0
            if not (self._may_take(num_pages + spare) and self.allocator.take(entry.sequence, num_pages, num_spare=spare)):
                break
            del self._waiting[0]
            self._num_pages += num_pages
            entry.held = True
            insort(self._started, entry, key=_turn)
            started.append(entry.sequence)
        return started

    def ready(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """num_cached_tokens: how many leading tokens' KV was loaded into the pages; fewer than all, for one has to be computed."""
        if not 0 <= num_cached_tokens < sequence.num_tokens:
            raise ValueError(f"{num_cached_tokens} tokens cached of {sequence.num_tokens}: at least the last one is computed")
        entry = self._entries.get(sequence)
        if entry is None or entry.left:
            return
        sequence.num_computed_tokens = num_cached_tokens
        self.allocator.keep(sequence)
        entry.runnable = True

    def schedule(self, budget: int | None = None) -> Step:
        """The chunks of the next step, none if nothing is runnable. Steps are recorded in the order in which they were scheduled.

        budget: of its tokens, at most max_tokens_per_step; None: that.
        """
        runnable = [entry for entry in self._started if entry.runnable and _num_missing(entry)]
        budget = self.max_tokens_per_step if budget is None else min(budget, self.max_tokens_per_step)
        sizes: dict[_Entry, int] = {}
        for _, equals in itertools.groupby(runnable, key=lambda entry: entry.turn[:2]):
            budget = self._share(list(equals), budget, sizes)
        chunks: list[StepChunk] = []
        for entry, size in sizes.items():
            chunks.append(StepChunk(entry.sequence, entry.sequence.num_computed_tokens + entry.num_pending, size))
            entry.num_steps += 1
            entry.num_pending += size
        return Step(chunks)

    def withdraw(self, step: Step) -> None:
        """The step that was scheduled last does not run after all."""
        for chunk in step.chunks:
            entry = self._entries[chunk.sequence]
            _give_back(entry, chunk)
            self._free_if_done(entry)

    def record(self, step: Step) -> list[Sequence]:
        """The prompts that the step completed, in the order of step.sampled less the aborted; their pages stand until release()."""
        finished: list[Sequence] = []
        for chunk in step.chunks:
            entry = self._entries[chunk.sequence]
            _give_back(entry, chunk)
            if entry.left:
                self._free_if_done(entry)
                continue
            chunk.sequence.num_computed_tokens += chunk.num_tokens
            if chunk.is_last:
                self.allocator.keep(chunk.sequence)
                self._leave(entry)
                finished.append(chunk.sequence)
        return finished

    def abort(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is. Nothing happens to one that is finished or unknown."""
        entry = self._entries.get(sequence)
        if entry is not None and not entry.left:
            self._leave(entry)
            self._free_if_done(entry)

    def release(self, sequence: Sequence) -> None:
        """The caller does not touch the pages of a finished or aborted sequence any more. Idempotent."""
        entry = self._entries.get(sequence)
        if entry is not None:
            entry.held = False
            self._free_if_done(entry)

    def _may_take(self, num_pages: int) -> bool:
        """As far as its own share goes; a page that two of its prompts use counts twice."""
        return self._num_pages == 0 or self._num_pages + num_pages <= self.allocator.num_pages - self.num_reserved_pages

    def _share(self, entries: list[_Entry], budget: int, sizes: dict[_Entry, int]) -> int:
        """Divides budget, adds the chunks' sizes to sizes and returns what is left."""
        fair = max(budget // len(entries), self.block_size) if entries else 0
        # the second round hands what short prompts left over to the first that can use it
        for limit in (fair, budget):
            for entry in entries:
                num_scheduled = sizes.get(entry, 0)
                size = self._chunk_size(entry, num_scheduled + min(budget, limit))
                if size > num_scheduled:
                    sizes[entry] = size
                    budget -= size - num_scheduled
        return budget

    def _chunk_size(self, entry: _Entry, limit: int) -> int:
        """At most limit tokens, ending at a multiple of the alignment or at the prompt's end."""
        start, missing = entry.sequence.num_computed_tokens + entry.num_pending, _num_missing(entry)
        if missing <= limit:
            return missing
        return max((start + limit) // self.chunk_alignment * self.chunk_alignment - start, 0)

    def _leave(self, entry: _Entry) -> None:
        entry.left = self._turns.changed = True
        _discard(self._waiting, entry)
        _discard(self._started, entry)

    def _free_if_done(self, entry: _Entry) -> None:
        if entry.left and not entry.held and not entry.num_steps:
            self._num_pages -= len(entry.sequence.pages)
            self.allocator.release(entry.sequence)
            del self._entries[entry.sequence]


def _turn(entry: _Entry) -> tuple[int, ...]:
    return entry.turn


def _discard(entries: list[_Entry], entry: _Entry) -> None:
    if entry in entries:
        entries.remove(entry)


def _num_missing(entry: _Entry) -> int:
    """Tokens that neither stand in the pages nor are computed by the steps under way."""
    return entry.sequence.num_tokens - entry.sequence.num_computed_tokens - entry.num_pending


def _work(entry: _Entry) -> ChunkWork:
    num_left = _num_missing(entry)
    return ChunkWork(entry.sequence.num_tokens - num_left, num_left)


def _give_back(entry: _Entry, chunk: StepChunk) -> None:
    """The step is over, or does not run after all."""
    entry.num_steps -= 1
    entry.num_pending -= chunk.num_tokens
