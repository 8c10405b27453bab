"""The choice among ways of a product, with stub matrices and made-up times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfmoon.engine.linears import DenseLinear, Int4Linear, Linear, size_class
from halfmoon.engine.product_ways import choose_ways
from halfmoon.engine.quantize import quantize


class Stub(Int4Linear):
    """An int4 matrix with two ways, of which none computes."""

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        went.append((len(x), way))
        return x

    def candidates(self, x: torch.Tensor) -> list[str]:
        return ["tiles", "dequantized"]


went: list[tuple[int, str]] = []


def stub(num_out: int) -> Stub:
    made = quantize(torch.randn(num_out, 64), "int4")
    assert isinstance(made, Int4Linear)
    return Stub(weight=made.weight, scales=made.scales, zeros=made.zeros, group_len=made.group_len)


@pytest.fixture
def measure_ms() -> Callable[[Callable[[], None]], float]:
    """Tiles cost what they have tokens, and the other way 100."""

    def measure(run: Callable[[], None]) -> float:
        went.clear()
        run()
        num_tokens, way = went[0]
        return num_tokens if way == "tiles" else 100.0

    return measure


def test_each_size_goes_the_way_that_was_faster_there(measure_ms: Any) -> None:
    one, alike, larger = stub(8), stub(8), stub(16)
    choose_ways([one, alike, larger], torch.float32, measure_ms=measure_ms)
    for linear in (one, alike, larger):
        for num_tokens, wanted in [(1, "tiles"), (64, "tiles"), (65, "dequantized"), (8192, "dequantized"), (20_000, "dequantized")]:
            linear(torch.zeros(num_tokens, 64))
            assert went[-1] == (num_tokens, wanted)


def test_a_form_is_measured_once_over_several_of_its_matrices(measure_ms: Any) -> None:
    sizes: list[int] = []

    def counted(run: Callable[[], None]) -> float:
        found = measure_ms(run)
        sizes.append(len(went))
        return found

    choose_ways([stub(8) for _ in range(6)], torch.float32, measure_ms=counted)
    assert sizes == [4] * 28, "14 sizes, two ways, four matrices one after another"


def test_plain_matrices_have_one_way_and_are_not_measured() -> None:
    calls: list[Any] = []
    linears: list[Linear] = [DenseLinear(weight=torch.zeros(8, 8)), quantize(torch.randn(8, 64), "fp8")]
    choose_ways(linears, torch.float32, measure_ms=lambda run: calls.append(run) or 0.0)
    assert calls == [], "the reference has one way, too"
    assert set(linears[1].ways.values()) == {""} and not linears[0].ways


def test_progress_ends_with_all_sizes_of_all_forms(measure_ms: Any) -> None:
    calls: list[tuple[str, int, int]] = []
    choose_ways([stub(8), stub(16)], torch.float32, lambda *call: calls.append(call), measure_ms)
    assert calls[-1] == ("measuring products", 28, 28) and len(calls) == 29


def test_size_classes_are_the_powers_of_two_above() -> None:
    assert [size_class(count) for count in (1, 2, 3, 4, 5, 8, 9, 8192)] == [0, 1, 2, 2, 3, 3, 4, 13]
