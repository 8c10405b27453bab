"""Which sequences make the next step of a decode worker. Pure: no tensor, no clock, no I/O; the caller brings the lock.

add ─► waiting ─start─► loading ─admit─► running ─schedule─► step ─record─► finished ─release─► pages free
          ▲      pages    its hand-off     │  a token each, pages grow        its blocks are
          └────────── preempt ◄────────────┘  on demand                       cached from the pages

begin_prefill stands in admit's place where there is no hand-off: the prompt behind its cached prefix is computed here.
A preempted sequence gave up its pages: once it has pages again its KV is computed here. Both go in chunks beside the others' tokens.
abort at any point takes a sequence out; its pages are free once it is out of the steps under way and released.

The step behind one that still runs may be scheduled ahead of its record, as if nobody ended in it, whatever either computes:
    schedule ─► step n ──schedule_ahead──► step n+1 ─► record(n) ──schedule_ahead──► step n+2 ─► record(n+1) ─► …
Who did end in step n has its token of step n+1 thrown away. Nobody is preempted while a step runs.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.page_allocator import PageAllocator
from ..engine.prompt_turns import LATE_SPARE, LeftS, PromptTurns, turn_of
from ..engine.sequence import Sequence, StepChunk
from ..engine.step_budget import DecodeLoad
from ..protocol.blocks import div_ceil
from ..protocol.errors import ConfigError, PromptTooLong
from ..protocol.timing.chunk_sizer import token_target_s
from ..protocol.timing.step_cost import ChunkWork, StepWork
from ..protocol.v1 import common_pb2


class Step(NamedTuple):
    chunks: list[StepChunk]
    preempted: list[Sequence]  # to make room for this step
    sampled: list[Sequence]  # whose next token the step's logits give, in the logits' order

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Generated(NamedTuple):
    """A token that a step gave, and why it was the last one if it was."""

    sequence: Sequence
    row: int  # in Step.sampled and the step's logits
    finish_reason: common_pb2.FinishReason | None


@dataclass(slots=True, eq=False)
class _Entry:
    sequence: Sequence
    order: tuple[int, int]  # queue_order, arrival
    turn: tuple[int, ...]  # of its prompt, see PromptTurns
    late: bool = False
    held: bool = False  # the caller may read and write the pages: from start() to admit(), from the last token to release()
    admitted: bool = False  # its hand-off or cached prefix was taken in: whatever it lacks is computed here
    num_steps: int = 0  # scheduled and not recorded yet, that it is in
    num_pending: int = 0  # tokens that those compute
    num_coming: int = 0  # tokens that those give it
    left: bool = False  # finished or aborted
    num_preemptions: int = 0


class DecodeScheduler:
    """Sequences start, run and resume in order of priority, then arrival; the last in that order is the first preempted.

    The first in order is never preempted for another's sake, so every sequence ends. Prompts that are due and have no token yet start
    and are computed by turns that arrange() gives them, behind the others.

    Args:
        eos_token_ids: of the model.
        max_running: sequences in one step.
        max_prefill_tokens_per_step: computed in one step for prompts without a hand-off and sequences that were preempted.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        block_size: int,
        *,
        eos_token_ids: frozenset[int],
        max_running: int,
        max_prefill_tokens_per_step: int,
    ) -> None:
        for name, value in (("max_running", max_running), ("max_prefill_tokens_per_step", max_prefill_tokens_per_step)):
            if value < 1:
                raise ConfigError(f"decode.{name} is {value}; it must be at least 1", key=f"decode.{name}")
        self.allocator = allocator
        self.block_size = block_size
        self.eos_token_ids = eos_token_ids
        self.max_running = max_running
        self.max_prefill_tokens_per_step = max_prefill_tokens_per_step
        self._turns = PromptTurns()
        self._arrivals = itertools.count()
        self._entries: dict[Sequence, _Entry] = {}  # until the pages are free
        self._waiting: list[_Entry] = []  # for pages; sorted by turn, the other two by order
        self._loading: list[_Entry] = []
        self._running: list[_Entry] = []

    @property
    def num_waiting(self) -> int:
        """Without a place in the batch: no pages yet, no pages any more, or the hand-off still on its way."""
        return len(self._waiting) + len(self._loading)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_outstanding_tokens(self) -> int:
        """Tokens of context, of sequences waiting and running."""
        return sum(entry.sequence.num_tokens for entry in itertools.chain(self._waiting, self._loading, self._running))

    @property
    def at_rest(self) -> bool:
        """Nothing is known of any sequence, and so every page is free."""
        return not self._entries

    def check(self, sequence: Sequence) -> None:
        """Raises PromptTooLong where the sequence at its longest would not fit into the pages, even alone."""
        longest = sequence.num_prompt_tokens + sequence.sampling.max_tokens
        limit = self.allocator.num_pages * self.block_size
        if max(longest, sequence.num_tokens + 1) > limit:
            raise PromptTooLong(
                f"prompt and max_tokens are {sequence.num_prompt_tokens} + {sequence.sampling.max_tokens} tokens; this decode worker's "
                f"pages hold {limit} (raise decode.kv_capacity_tokens or lower max_tokens)",
                num_tokens=longest,
                limit=limit,
            )

    def add(self, sequence: Sequence) -> None:
        """A sequence whose hand-off has begun, or that has none. Raises PromptTooLong."""
        self.check(sequence)
        order = sequence.queue_order, next(self._arrivals)
        entry = _Entry(sequence, order, turn_of(sequence, order))
        self._entries[sequence] = entry
        self._turns.changed = True
        insort(self._waiting, entry, key=_turn)

    def arrange(self, now_s: float, left_s: LeftS) -> None:
        """Prompts that are due get turns by that: those that have pages, and those that wait for some. See PromptTurns."""
        entries = itertools.chain(self._running, self._loading, self._waiting)
        prompts = ((entry, _work(entry)) for entry in entries if _num_missing(entry) > 1)
        if self._turns.arrange(prompts, now_s, left_s):
            self._waiting.sort(key=_turn)

    def start(self) -> list[Sequence]:
        """Gives pages to the waiting, in turn, for as long as they are there. Returns those that have something to load now.

        Who is late anyway leaves a part of the pages to those who are not.

        Those that were preempted run again. A page for each running sequence stays free, lest a start preempts at once. Leading blocks
        that are here count as computed: nothing is to be loaded into their pages, the first num_computed_tokens // block_size.
        """
        to_load: list[Sequence] = []
        while self._waiting:
            entry = self._waiting[0]
            num_pages = div_ceil(entry.sequence.num_tokens, self.block_size)
            spare = len(self._running)
            spare += self.allocator.num_pages // LATE_SPARE if entry.late and self._running else 0
            if not self.allocator.take(entry.sequence, num_pages, num_spare=spare):
                break
            del self._waiting[0]
            insort(self._running if entry.admitted else self._loading, entry, key=_order)
            if not entry.admitted:
                entry.held = True
                to_load.append(entry.sequence)
        return to_load

    def admit(self, sequence: Sequence, first_token_id: int) -> common_pb2.FinishReason | None:
        """The hand-off stands in the pages, whole and verified. Returns why the sequence ends with its first token, if it does.

        Raises ValueError for a sequence that is not loading.
        """
        entry = self._loaded(sequence)
        sequence.num_computed_tokens = sequence.num_tokens
        self.allocator.keep(sequence)
        sequence.token_ids.append(first_token_id)
        reason = sequence.finish_reason(self.eos_token_ids)
        if reason is None:
            entry.held = False
            insort(self._running, entry, key=_order)
        else:
            entry.left = True
        return reason

    def begin_prefill(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """The KV of the first num_cached_tokens stands in the pages, verified; steps compute the rest and sample the first token.

        Raises ValueError for a sequence that is not loading, or with nothing left to compute: its last token gives the first logits.
        """
        if not 0 <= num_cached_tokens < sequence.num_tokens:
            raise ValueError(f"{num_cached_tokens} of {sequence.num_tokens} tokens are cached; at least the last one must be computed")
        entry = self._loaded(sequence)
        sequence.num_computed_tokens = num_cached_tokens
        self.allocator.keep(sequence)
        entry.held = False
        insort(self._running, entry, key=_order)

    @property
    def waiting_chunks(self) -> list[ChunkWork]:
        """What the next step's prefill chunks are of, in their order."""
        return [_work(entry) for entry in self._prompts()]

    def load(self, begins_at: float, default_tpot_s: float) -> DecodeLoad:
        """What the next step decodes, were it to begin then. default_tpot_s: of sequences without a TPOT of their own."""
        num_decodes = num_context_tokens = 0
        target_s = math.inf
        for entry in self._running:
            if num_decodes == self.max_running:
                break
            if _num_missing(entry) == 1 and not _surely_ends(entry):
                sequence = entry.sequence
                num_decodes += 1
                num_context_tokens += sequence.num_tokens + entry.num_coming
                num_given, since_s = 0, 0.0
                if sequence.paced_at:
                    num_given = sequence.num_output_tokens + entry.num_coming - sequence.paced_from
                    since_s = begins_at - sequence.paced_at
                target_s = min(target_s, token_target_s(sequence.tpot_slo_s or default_tpot_s, num_given, since_s))
        return DecodeLoad(StepWork(num_decodes=num_decodes, num_context_tokens=num_context_tokens), target_s)

    def schedule(self, budget: int | None = None) -> Step:
        """The next step, without chunks if nothing runs. Every step before it has been recorded.

        Prefill chunks share a budget of tokens in order; who gets none of it leaves its place in the step to the next.

        Args:
            budget: None: max_prefill_tokens_per_step.
        """
        chunks: list[StepChunk] = []
        preempted: list[Sequence] = []
        sizes = self._sizes(budget)
        for entry in self._running.copy():
            if len(chunks) == self.max_running:
                break
            if not entry.sequence.pages:  # preempted by one before it
                continue
            size = sizes[entry]
            if size and self._grow(entry, preempted):
                chunks.append(_take(entry, size))
        return Step(chunks, preempted, [chunk.sequence for chunk in chunks if chunk.is_last])

    def schedule_ahead(self, budget: int | None = None) -> Step | None:
        """The step behind the one that runs, which is the only one that is not recorded yet; its record comes before this one's.

        A chunk may begin at the token that its sequence gets in the step that runs. Who is sure to end there has none, and others have
        its place. No chunks where nobody is left; None where that can't be decided yet, because pages are short.
        """
        chosen: list[tuple[_Entry, int]] = []
        sizes = self._sizes(budget)
        for entry in self._running:
            if len(chosen) == self.max_running:
                break
            if sizes[entry] and not _surely_ends(entry):
                chosen.append((entry, sizes[entry]))
        lacking = [entry for entry, _ in chosen if len(entry.sequence.pages) < self._num_pages_ahead(entry)]
        if not self.allocator.can_allocate(len(lacking)):
            return None
        for entry in lacking:
            entry.sequence.pages += self.allocator.allocate(1)
        # before _take, which counts these tokens in
        sampled = [entry.sequence for entry, size in chosen if size == _num_missing(entry)]
        return Step([_take(entry, size) for entry, size in chosen], [], sampled)

    def withdraw(self, step: Step) -> None:
        """It does not run after all. Pages that it was given for stay with their sequences."""
        sampled = set(step.sampled)
        for chunk in step.chunks:
            entry = self._entries[chunk.sequence]
            _give_back(entry, chunk, chunk.sequence in sampled)
            self._free_if_done(entry)

    def record(self, step: Step, token_ids: Items[int]) -> list[Generated]:
        """Keeps what the step gave; nothing of sequences that ended while it ran, or in the step before it.

        Pages of a finished sequence stand until release().

        Args:
            token_ids: one for each of step.sampled.
        """
        generated: list[Generated] = []
        rows = {sequence: row for row, sequence in enumerate(step.sampled)}
        for chunk in step.chunks:
            entry, sequence = self._entries[chunk.sequence], chunk.sequence
            row = rows.get(sequence)
            _give_back(entry, chunk, row is not None)
            if entry.left:
                self._free_if_done(entry)
                continue
            sequence.num_computed_tokens += chunk.num_tokens
            if row is not None:
                self.allocator.keep(sequence)
                sequence.token_ids.append(token_ids[row])
                reason = sequence.finish_reason(self.eos_token_ids)
                generated.append(Generated(sequence, row, reason))
                if reason is not None:
                    self._finish(entry)
        return generated

    def finish(self, sequence: Sequence) -> bool:
        """Ends a sequence early, as if its last token had been its end. False where it has ended already or is unknown."""
        entry = self._entries.get(sequence)
        if entry is None or entry.left:
            return False
        self._finish(entry)
        return True

    def abort(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is. Nothing happens to one that has ended or is unknown."""
        entry = self._entries.get(sequence)
        if entry is not None and not entry.left:
            self._leave(entry)
            self._free_if_done(entry)

    def release(self, sequence: Sequence) -> None:
        """The caller does not touch the pages of a sequence that has ended any more. Idempotent."""
        entry = self._entries.get(sequence)
        if entry is not None and entry.left:
            entry.held = False
            self._free_if_done(entry)

    def num_preemptions(self, sequence: Sequence) -> int:
        entry = self._entries.get(sequence)
        return 0 if entry is None else entry.num_preemptions

    def _prompts(self) -> list[_Entry]:
        """Of the running, who lacks more than a token; in turn."""
        return sorted((entry for entry in self._running if _num_missing(entry) > 1), key=_turn)

    def _sizes(self, budget: int | None) -> dict[_Entry, int]:
        """Tokens that each of the running may have in the next step. Prompts share the budget, one after another."""
        left = self.max_prefill_tokens_per_step if budget is None else budget
        for entry in self._running:
            self._catch_up(entry)
        sizes = dict.fromkeys(self._running, 1)  # who lacks one token gets it from no budget
        for entry in self._prompts():
            sizes[entry] = size = min(_num_missing(entry), left)
            left -= size
        return sizes

    def _loaded(self, sequence: Sequence) -> _Entry:
        entry = self._entries.get(sequence)
        if entry is None or entry not in self._loading:
            raise ValueError(f"sequence {sequence.request_id} is not loading")
        self._loading.remove(entry)
        entry.admitted = self._turns.changed = True
        return entry

    def _num_pages_ahead(self, entry: _Entry) -> int:
        """That hold its tokens, those it gets in steps under way among them."""
        return div_ceil(entry.sequence.num_tokens + entry.num_coming, self.block_size)

    def _catch_up(self, entry: _Entry) -> None:
        """Past the blocks of its prompt that another has computed since its last chunk."""
        sequence = entry.sequence
        if not entry.num_steps and _num_missing(entry) > self.block_size:
            found = self.allocator.advance(sequence, sequence.num_computed_tokens)
            sequence.num_skipped_tokens += found - sequence.num_computed_tokens
            sequence.num_computed_tokens = found

    def _grow(self, entry: _Entry, preempted: list[Sequence]) -> bool:
        """A page for the next token where the last one is full. False where that took the sequence's own pages."""
        sequence = entry.sequence
        while len(sequence.pages) < div_ceil(sequence.num_tokens, self.block_size):
            if self.allocator.can_allocate(1):
                sequence.pages += self.allocator.allocate(1)
                continue
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim.sequence)
            if victim is entry:
                return False
        return True

    def _preempt(self, entry: _Entry) -> None:
        self._running.remove(entry)
        self.allocator.release(entry.sequence)
        entry.sequence.num_computed_tokens = entry.sequence.num_skipped_tokens = 0
        entry.num_preemptions += 1
        entry.turn = turn_of(entry.sequence, entry.order)
        insort(self._waiting, entry, key=_turn)

    def _finish(self, entry: _Entry) -> None:
        self._leave(entry)
        self.allocator.keep_tail(entry.sequence)  # now: its next turn may come before its pages are released
        entry.held = True

    def _leave(self, entry: _Entry) -> None:
        entry.left = self._turns.changed = True
        for entries in (self._waiting, self._loading, self._running):
            if entry in entries:
                entries.remove(entry)

    def _free_if_done(self, entry: _Entry) -> None:
        if entry.left and not entry.held and not entry.num_steps:
            self.allocator.release(entry.sequence)
            del self._entries[entry.sequence]


def _order(entry: _Entry) -> tuple[int, int]:
    return entry.order


def _turn(entry: _Entry) -> tuple[int, ...]:
    return entry.turn


def _num_missing(entry: _Entry) -> int:
    """Tokens whose KV is neither there nor computed by the steps under way, those that the steps give it among them."""
    sequence = entry.sequence
    return sequence.num_tokens + entry.num_coming - sequence.num_computed_tokens - entry.num_pending


def _work(entry: _Entry) -> ChunkWork:
    """What of it has to be computed before its next token."""
    num_left = _num_missing(entry)
    return ChunkWork(entry.sequence.num_tokens + entry.num_coming - num_left, num_left)


def _surely_ends(entry: _Entry) -> bool:
    """With the token that a step under way gives it."""
    return entry.num_coming > 0 and entry.sequence.num_output_tokens + entry.num_coming >= entry.sequence.sampling.max_tokens


def _take(entry: _Entry, size: int) -> StepChunk:
    """The next size tokens, as a chunk of a step that is under way from now on."""
    start = entry.sequence.num_computed_tokens + entry.num_pending
    gives_token = size == _num_missing(entry)
    entry.num_steps += 1
    entry.num_pending += size
    entry.num_coming += gives_token
    return StepChunk(entry.sequence, start, size)


def _give_back(entry: _Entry, chunk: StepChunk, gave_token: bool) -> None:
    """The step is over, or does not run after all."""
    entry.num_steps -= 1
    entry.num_pending -= chunk.num_tokens
    entry.num_coming -= gave_token
