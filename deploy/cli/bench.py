"""`halfmoon bench NAME`: runs tests/benchmarks/NAME.py, where the figures of docs/performance.md come from.

Benchmarks stand beside the tests and are not installed: they need a checkout.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import typer

FOLDER = Path(__file__).parents[2] / "tests" / "benchmarks"


def benchmarks() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def bench(name: str, arguments: list[str]) -> None:
    """Runs one with its own arguments. Raises typer.BadParameter for an unknown name."""
    if not FOLDER.is_dir():
        raise typer.BadParameter("benchmarks are not installed; run `pip install -e .` in a checkout and call this there")
    if name not in benchmarks():
        raise typer.BadParameter(f"no benchmark {name!r}; there are {', '.join(benchmarks())}")
    sys.argv = [f"halfmoon bench {name}", *arguments]
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
