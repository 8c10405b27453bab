"""What a worker measures of its steps before the first request."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, cast

import pytest

from halfmoon.engine import calibration
from halfmoon.engine.calibration import calibrate
from halfmoon.engine.executor import ExecutorFacts
from halfmoon.engine.model_flops import ModelFlops
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import StepChunk
from halfmoon.engine.step_budget import work_of
from halfmoon.protocol.timing.step_cost import StepCost

TRUTH = StepCost(read_s=5e-3, chunk_s=2e-3, per_token_s=20e-6, per_attention_s=1e-9, per_decode_s=2e-5, per_context_s=4e-8)


class Machine:
    """An executor whose steps take what TRUTH says, on a clock of its own."""

    def __init__(self, num_pages: int, max_model_len: int = 8192) -> None:
        self.facts = ExecutorFacts(
            cast("Any", _Schema()), 100, frozenset(), max_model_len, num_pages, "cpu", 0, ModelFlops(0.0, 0.0, 0.0), None
        )
        self.now_s = 0.0
        self.largest = 0

    def run(self, chunks: Seq[StepChunk]) -> None:
        for chunk in chunks:
            assert chunk.start + chunk.num_tokens <= len(chunk.sequence.pages) * 64, "a chunk beyond its pages"
        self.largest = max(self.largest, *(chunk.num_tokens for chunk in chunks))
        self.now_s += TRUTH.seconds(work_of(chunks))


class _Schema:
    block_size = 64


def measure(monkeypatch: pytest.MonkeyPatch, machine: Machine, most: int = 2048) -> tuple[StepCost, PageAllocator]:
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: machine.now_s)
    allocator = PageAllocator(machine.facts.num_pages)
    return calibrate(cast("Any", machine), allocator, most), allocator


def test_it_finds_what_steps_cost_and_gives_the_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found, allocator = measure(monkeypatch, Machine(100))
    assert found.read_s == pytest.approx(TRUTH.read_s, rel=0.02)
    assert found.per_decode_s == pytest.approx(TRUTH.per_decode_s, rel=0.2)
    assert found.per_context_s == pytest.approx(TRUTH.per_context_s, rel=0.05)
    # a chunk of 64 hides under the read of the weights, so that the line through the two is a little too flat
    assert found.per_token_s == pytest.approx(TRUTH.per_token_s, rel=0.15)
    assert allocator.num_free == 100


@pytest.mark.parametrize(("num_pages", "max_model_len", "most"), [(1, 64, 2048), (2, 8192, 64), (100, 96, 2048), (100, 8192, 64)])
def test_small_pages_and_models_are_measured_in_smaller_steps(
    monkeypatch: pytest.MonkeyPatch, num_pages: int, max_model_len: int, most: int
) -> None:
    machine = Machine(num_pages, max_model_len)
    found, allocator = measure(monkeypatch, machine, most)
    assert all(value >= 0.0 for value in found[2:]) and found.read_s > 0.0
    assert machine.largest < max_model_len and allocator.num_free == num_pages


def test_a_slow_machine_is_not_kept_busy_by_large_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PATIENCE_S", 0.004)
    machine = Machine(100)
    measure(monkeypatch, machine)
    assert machine.largest == 128
