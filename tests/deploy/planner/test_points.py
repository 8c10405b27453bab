"""A cost model fitted to steps that a known one made, and tables that are wrong."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from halfmoon.deploy.planner.points import Point, fit_points, read_points
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.predictors import CostModel

TRUTH = CostModel(
    name="truth", prefill_s=2e-3, per_token_s=2e-5, per_token_prefix_s=1e-9, per_token_squared_s=5e-10, step_s=5e-3, per_sequence_s=1e-5,
    per_kv_token_s=4e-8, overlap=3.0, kv_bytes_per_token=131072, num_layers=32, kv_capacity_tokens=400_000, cache_tokens=300_000,
    link_bytes_per_s=2e10,
)  # fmt: skip
OTHER = dataclasses.replace(TRUTH, prefill_s=1e-3, per_token_s=9e-5, per_token_prefix_s=7e-9, per_token_squared_s=3.5e-9, step_s=2e-2,
                            per_sequence_s=0.0, per_kv_token_s=1e-9, overlap=4.0)  # fmt: skip
CHUNKS = [(1, 256, 0), (1, 2048, 0), (1, 512, 8192), (1, 2048, 16384), (8, 256, 0)]
BATCHES = [(1, 2000), (32, 64_000), (64, 500_000)]


def points(chunks: list[tuple[int, int, int]] = CHUNKS, *, mixed: bool = True) -> list[Point]:
    """Steps as TRUTH has them; its time of each is written down a second time here."""

    def seconds(prompts: int, new: int, prefix: int, sequences: int, context: int) -> float:
        products = 2e-3 + prompts * new * 2e-5 if prompts else 0.0
        both = (products**3 + 5e-3**3) ** (1 / 3) if products and sequences else products or 5e-3
        return both + prompts * new * (prefix + new / 2) * 1e-9 + sequences * 1e-5 + context * 4e-8

    rows = [(*chunk, 0, 0) for chunk in chunks] + [(0, 0, 0, *batch) for batch in BATCHES]
    rows += [(*chunk, *batch) for chunk, batch in itertools.product(chunks, BATCHES)] if mixed else []
    return [Point(*row, seconds(*row)) for row in rows]


def test_what_made_the_steps_is_found_whatever_the_fit_begins_with() -> None:
    found = fit_points(points(), OTHER, "measured")
    assert found.largest_error < 0.01 and found.cost.overlap == 3.0
    for name in ("prefill_s", "per_token_s", "per_token_prefix_s", "per_token_squared_s", "step_s", "per_sequence_s", "per_kv_token_s"):
        assert getattr(found.cost, name) == pytest.approx(getattr(TRUTH, name), rel=0.03), name
    assert (found.cost.source, found.cost.kv_capacity_tokens) == ("measured", 400_000)


def test_what_points_do_not_tell_is_kept() -> None:
    alike = fit_points(points([(1, 1024, 8192), (1, 1100, 8192), (1, 1200, 8192)], mixed=False), OTHER, "measured").cost
    assert (alike.prefill_s, alike.per_token_prefix_s, alike.overlap) == (1e-3, 7e-9, 4.0)
    assert alike.step_s == pytest.approx(5e-3, rel=0.01), "decode steps were told"


def test_too_few_points_are_told() -> None:
    with pytest.raises(ConfigError, match="2 different chunks and 3 different batches"):
        fit_points(points(CHUNKS[:2]), OTHER, "measured")


def test_a_table_has_comments_and_columns_that_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("# one GPU\nnew_tokens,sequences,context_tokens,seconds\n512,0,0,0.02\n\n0,8,16000,0.01\n")
    assert read_points(path) == [Point(1, 512, 0, 0, 0, 0.02), Point(1, 0, 0, 8, 16000, 0.01)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("new_tokens,seconds\n", "points.csv:1 lacks the column sequences"),
        ("new_tokens,sequences,context_tokens,seconds\n512,0,0,fast\n", "points.csv:2 is no step: could not convert"),
        ("new_tokens,sequences,context_tokens,seconds\n512,0,0\n", "points.csv:2 is no step"),
        ("# note\nnew_tokens,sequences,context_tokens,seconds\n512,0,0,0.1\n0,0,0,0.1\n", "points.csv:4 is no step"),
        ("new_tokens,sequences,context_tokens,seconds\n512,-1,0,0.1\n", "points.csv:2 is no step"),
        ("new_tokens,sequences,context_tokens,seconds\n512,0,0,-0.1\n", "points.csv:2 is no step"),
    ],
)
def test_a_line_that_is_no_step_is_named_by_its_number(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_points(path)
    assert told in caught.value.message and "\n" not in caught.value.message


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no points at"):
        read_points(tmp_path / "none.csv")
