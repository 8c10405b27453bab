"""A step that breaks, on an executor that is told which sequences break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.executor import BlockPush, DeviceLost, StepFailed, StepOutcome, TokenSample
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_runner import MAX_BARREN_STEPS, StepRunner
from halfmoon.protocol.errors import SequenceFailed
from halfmoon.protocol.sampling import SamplingParams

NUM_LAYERS = 4


@dataclass
class Breaking:
    """Executor and page transfer in one. Runs of a breaking sequence push a layer or two, and raise."""

    breaking: set[Sequence]
    num_pushed: int = 0
    runs: list[list[Sequence]] = field(default_factory=list[list[Sequence]])
    layers: dict[int, list[int]] = field(default_factory=dict[int, list[int]])  # by the first page of a push: what came, in order
    facts: Any = field(default_factory=lambda: SimpleNamespace(schema=SimpleNamespace(num_layers=NUM_LAYERS)))

    @property
    def pages(self) -> Any:
        return self

    def run(self, chunks: list[StepChunk], pushes: list[BlockPush] = ()) -> StepOutcome:  # type: ignore[assignment]
        self.runs.append([chunk.sequence for chunk in chunks])
        broken = any(chunk.sequence in self.breaking for chunk in chunks)
        last = (self.num_pushed if broken else NUM_LAYERS) if pushes else 0
        self.push(pushes, range(last))
        if broken:
            raise StepFailed("broken", last)
        return StepOutcome([TokenSample(chunk.sequence.token_ids[0], None, []) for chunk in chunks if chunk.is_last], {})

    def push(self, pushes: list[BlockPush], layers: range) -> None:
        for push in pushes:
            self.layers.setdefault(push.pages[0], []).extend(layers)

    def when_landed(self, call: Callable[[], None]) -> None:
        call()


def made(number: int, suspect: bool = False) -> Sequence:
    return Sequence(f"r{number}", [number, 0, 0], 3, SamplingParams(), pages=[number], suspect=suspect)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12), st.integers(0, NUM_LAYERS))
def test_who_breaks_a_step_fails_alone_and_the_others_layers_are_pushed_once_and_in_order(
    kinds: list[tuple[bool, bool, bool]], num_pushed: int
) -> None:
    sequences = [made(number, suspect) for number, (_, suspect, _) in enumerate(kinds)]
    breaking = {sequence for sequence, (breaks, _, _) in zip(sequences, kinds, strict=True) if breaks}
    chunks = [StepChunk(one, 0, 3 if last else 2) for one, (_, _, last) in zip(sequences, kinds, strict=True)]
    executor, listener = Breaking(breaking, num_pushed), SimpleNamespace(closed=False)
    pushes = [BlockPush(one.pages, SimpleNamespace(), 0, 1, listener) for one in sequences]  # type: ignore[arg-type]
    computed = StepRunner(executor).run(chunks, pushes)  # type: ignore[arg-type]
    assert set(computed.failed) == breaking and all(isinstance(error, SequenceFailed) for error in computed.failed.values())
    sampled = [chunk.sequence for chunk in chunks if chunk.is_last]
    assert len(computed.samples) == len(sampled)
    for sequence, found in zip(sampled, computed.samples, strict=True):
        assert sequence in breaking or found.token_id == sequence.token_ids[0]
    for sequence in set(sequences) - breaking:
        assert executor.layers[sequence.pages[0]] == list(range(NUM_LAYERS))
    for run in executor.runs:
        assert len(run) == 1 or not any(sequence.suspect for sequence in run)


def test_a_step_without_a_fault_runs_once() -> None:
    executor = Breaking(set())
    StepRunner(executor).run([StepChunk(made(number), 0, 3) for number in range(8)], [])  # type: ignore[arg-type]
    assert len(executor.runs) == 1


def test_a_lost_device_ends_the_run_and_names_who_was_computed() -> None:
    suspect, others = made(0, suspect=True), [made(1), made(2)]

    class Lost(Breaking):
        def run(self, chunks: list[StepChunk], pushes: list[BlockPush] = ()) -> StepOutcome:  # type: ignore[assignment]
            if chunks[0].sequence is suspect:
                raise DeviceLost("gone")
            return super().run(chunks, pushes)

    runner = StepRunner(Lost(set()))  # type: ignore[arg-type]
    with pytest.raises(DeviceLost):
        runner.run([StepChunk(one, 0, 3) for one in (suspect, *others)], [])
    assert runner.running == [suspect]


def test_only_steps_in_a_row_that_compute_nothing_are_the_workers_own_fault() -> None:
    bad, good = made(0), made(1)
    runner = StepRunner(Breaking({bad}))  # type: ignore[arg-type]
    for _ in range(2):
        for _ in range(MAX_BARREN_STEPS - 1):
            assert set(runner.run([StepChunk(bad, 0, 3)], []).failed) == {bad}
        runner.run([StepChunk(bad, 0, 3), StepChunk(good, 0, 3)], [])
    with pytest.raises(StepFailed, match="8 steps in a row"):
        for _ in range(MAX_BARREN_STEPS):
            runner.run([StepChunk(bad, 0, 3)], [])
