"""decode_worker's DecodeScheduler, driven so that a step in which nothing is decided costs nothing a sequence.

Between a join, a page boundary and an end, every step of a decode batch is the same: each sequence gets one token. Such steps are
only counted (a sequence's length is its start + the steps since), and the scheduler is asked where it has something to decide:
    start() · admit()      a hand-off joins                     finish() · release()   a sequence got its last token
    _grow()                a sequence needs its next page       schedule() · record()  pages are short, or a preempted one recomputes
tests/simulator/test_decode_batch.py holds it against the same class called every step.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from ..decode_worker.scheduler import DecodeScheduler, Step
from ..engine.page_allocator import PageAllocator
from ..engine.sequence import Sequence
from ..protocol.sampling import SamplingParams


class StepCount:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class CountedTokens:
    """Stands where a list of token ids would: a length that grows by one a step while the sequence runs."""

    __slots__ = ("_length", "_since", "_steps")

    def __init__(self, length: int, steps: StepCount) -> None:
        self._length = length
        self._steps = steps
        self._since = -1

    def __len__(self) -> int:
        return self._length if self._since < 0 else self._length + self._steps.value - self._since

    def __getitem__(self, index: int) -> int:
        return 0

    def append(self, token_id: int) -> None:
        self._length += 1

    def run(self) -> None:
        self._since = self._steps.value

    def stop(self) -> None:
        self._length = len(self)
        self._since = -1


def decode_sequence(request_id: str, num_prompt: int, num_tokens: int, num_output: int, queue_order: int, steps: StepCount) -> Sequence:
    """num_tokens: of the prompt and what was sent before (a replay)."""
    sampling = SamplingParams(max_tokens=num_output, ignore_eos=True)
    tokens = CountedTokens(num_tokens, steps)
    return Sequence(request_id, tokens, num_prompt, sampling, queue_order=queue_order)  # type: ignore[arg-type]


class Ended(NamedTuple):
    finished: list[Sequence]
    got_token: set[Sequence]  # the others of the batch are preempted, recomputing, or past max_running


class DecodeBatch(DecodeScheduler):
    """num_batch sequences with num_kv_tokens of context get a token each in every step that follows."""

    def __init__(self, allocator: PageAllocator, block_size: int, *, max_running: int, max_prefill_tokens_per_step: int = 2048) -> None:
        super().__init__(
            allocator,
            block_size,
            eos_token_ids=frozenset(),
            max_running=max_running,
            max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        )
        self.steps = StepCount()
        self.num_batch = 0
        self.num_kv_tokens = 0
        self.num_preempted = 0
        self._joining: list[Sequence] = []
        self._batch: dict[Sequence, int] = {}  # in counted steps -> number of their heap entries
        self._numbers = 0
        self._ends: list[tuple[int, int, Sequence]] = []  # step whose record() ends it
        self._growths: list[tuple[int, int, Sequence]] = []  # step whose schedule() needs a page more
        self._whole = False  # the scheduler is asked every step

    def join(self, sequence: Sequence, first_token_id: int = 0) -> bool:
        """admit(), and into the batch from the next step on. True where the first token was the last: release() is the caller's."""
        if self.admit(sequence, first_token_id) is not None:
            return True
        self._joining.append(sequence)
        return False

    def leave(self, sequence: Sequence) -> None:
        """abort(), for one that may be in the batch."""
        self._out(sequence)
        if sequence in self._joining:
            self._joining.remove(sequence)
        self.abort(sequence)
        self.release(sequence)

    @property
    def sequences(self) -> list[Sequence]:
        """That are in counted steps."""
        return list(self._batch)

    @property
    def has_work(self) -> bool:
        return bool(self._batch or self._joining or self._running)

    def prepare(self) -> Step | None:
        """Before a step: takes in who joined, gives pages. None where the step is a counted one, else the scheduler's own."""
        if not self._whole:
            for sequence in self._joining:
                self._in(sequence)
        self._joining.clear()
        if not self._whole:
            self._whole = len(self._running) != len(self._batch) or len(self._running) > self.max_running or not self._give_pages()
            if self._whole:
                for sequence in list(self._batch):
                    self._out(sequence)
                    sequence.num_computed_tokens = sequence.num_tokens - 1
        return self.schedule() if self._whole else None

    def num_same_steps(self) -> int:
        """After prepare() gave None: steps until one ends or needs a page, at least 1."""
        self._drop_stale(self._ends)
        self._drop_stale(self._growths)
        return min(self._ends[0][0] + 1, self._growths[0][0]) - self.steps.value

    def count(self, num_steps: int) -> list[Sequence]:
        """num_steps counted steps were done, at most num_same_steps(). Returns who got the last token; their pages are free."""
        self.steps.value += num_steps
        self.num_kv_tokens += num_steps * self.num_batch
        finished: list[Sequence] = []
        self._drop_stale(self._ends)
        while self._ends and self._ends[0][0] < self.steps.value:
            sequence = heapq.heappop(self._ends)[2]
            self._out(sequence)
            self.finish(sequence)
            self.release(sequence)
            finished.append(sequence)
            self._drop_stale(self._ends)
        return finished

    def end_whole(self, step: Step) -> Ended:
        """The scheduler's own step was done."""
        self.steps.value += 1
        self.num_preempted += len(step.preempted)
        generated = self.record(step, [0] * len(step.sampled))
        got = {token.sequence for token in generated}
        finished = [token.sequence for token in generated if token.finish_reason is not None]
        for sequence in finished:
            self.release(sequence)
        running = [entry.sequence for entry in self._running]
        if len(running) <= self.max_running and all(sequence.num_tokens - sequence.num_computed_tokens == 1 for sequence in running):
            self._whole = False
            for sequence in running:
                if sequence not in self._joining:
                    self._in(sequence)
        return Ended(finished, got)

    def _give_pages(self) -> bool:
        """The pages that counted sequences need for the next step. False, and nothing preempted, where they are not there."""
        self._drop_stale(self._growths)
        while self._growths and self._growths[0][0] <= self.steps.value:
            if not self.allocator.can_allocate(1):
                return False
            _, number, sequence = heapq.heappop(self._growths)
            self._grow(self._entries[sequence], [])
            self._push_growth(sequence, number)
            self._drop_stale(self._growths)
        return True

    def _in(self, sequence: Sequence) -> None:
        self._numbers += 1
        self._batch[sequence] = number = self._numbers
        left = sequence.sampling.max_tokens - sequence.num_output_tokens
        heapq.heappush(self._ends, (self.steps.value + left - 1, number, sequence))
        self._push_growth(sequence, number)
        self.num_batch += 1
        self.num_kv_tokens += sequence.num_tokens
        sequence.token_ids.run()  # type: ignore[attr-defined]

    def _out(self, sequence: Sequence) -> None:
        if self._batch.pop(sequence, None) is None:
            return
        sequence.token_ids.stop()  # type: ignore[attr-defined]
        self.num_batch -= 1
        self.num_kv_tokens -= sequence.num_tokens

    def _push_growth(self, sequence: Sequence, number: int) -> None:
        # the schedule() that first sees more tokens than the pages hold
        ahead = len(sequence.pages) * self.block_size + 1 - sequence.num_tokens
        heapq.heappush(self._growths, (self.steps.value + ahead, number, sequence))

    def _drop_stale(self, heap: list[tuple[int, int, Sequence]]) -> None:
        while heap and self._batch.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
