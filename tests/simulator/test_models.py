"""docs/scheduling.md says what of the cluster's code the simulator runs, and what it models: both lists are held here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "scheduling.md").read_text()
BOOKS = {
    "clock", "counters", "goodput", "grid", "instance_options", "job", "loads", "owner",
    "plots", "replay", "report", "scenario", "sweep", "trace", "trace_formats",
}  # fmt: skip
"""Files that stand for nothing of a live cluster: the clock, the trace, options and figures."""
DECIDES = re.compile(
    r"(Conductor|Predictors|PrefixIndex|Backlog|TaskTable|Scheduler|Allocator|Sizer|Fit|ContentIndex)$|^(create_\w+|queue_order|token_target_s)$"
)
"""Names of what decides something, of all that the simulator imports."""


def test_every_file_that_models_something_is_in_the_table_and_no_other() -> None:
    table = set(re.findall(r"^\| `(\w+)\.py` \|", TEXT, re.MULTILINE))
    assert table == {path.stem for path in (ROOT / "simulator").glob("*.py")} - BOOKS - {"__init__"}


def test_what_is_said_to_run_is_what_is_imported() -> None:
    said = re.search(r"^Runs: (.*?)\.$", TEXT, re.MULTILINE | re.DOTALL)
    assert said is not None
    imported: set[str] = set()
    for path in (ROOT / "simulator").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                imported |= {alias.name for alias in node.names if DECIDES.search(alias.name)}
    assert set(re.findall(r"`(\w+)`", said[1])) == imported
