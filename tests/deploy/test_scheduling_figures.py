"""docs/scheduling.md: its figures are what its commands print."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(load: Any) -> Any:
    return load("scheduling_figures")


def test_every_table_of_simulated_figures_has_its_command(bench: Any) -> None:
    page = bench.PAGE.read_text()
    section = page[page.index("## Simulated figures") : page.index("## Measured figures")]
    found = bench.figures(page)
    lines = section.split("\n")
    num_tables = sum(not before and line.startswith("|") for before, line in itertools.pairwise(lines))
    assert len(found) == num_tables == section.count("```figures")
    for one in found:
        name = one.command.split()[2]
        assert one.command.startswith("halfmoon bench ") and (Path(bench.__file__).parent / f"{name}.py").is_file(), one.command
    assert any(one.kind == "quick" for one in found)


def test_a_quick_command_prints_what_the_page_says(bench: Any, tmp_path: Path) -> None:
    one = next(one for one in bench.figures(bench.PAGE.read_text()) if one.kind == "quick")
    assert bench.differences(one.table, bench.printed(one.command, tmp_path)) == []


def test_figures_may_differ_by_little_and_words_by_nothing(bench: Any) -> None:
    said = "| load | TTFT |\n|---|---|\n| code | **1.50** / 93.0% |\n"
    for printed in ("| code | 1.51 / 93.1% |\n", "| code | 1.50 / 93.0% |\n"):
        assert bench.differences(said, f"| load | TTFT |\n|---|---|\n{printed}") == []
    for printed in ("| code | 1.60 / 93.0% |\n", "| chat | 1.50 / 93.0% |\n", ""):
        assert bench.differences(said, f"| load | TTFT |\n|---|---|\n{printed}") != []
