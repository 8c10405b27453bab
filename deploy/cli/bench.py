"""`halfmoon bench NAME`: runs tests/benchmarks/NAME.py, where the figures of docs/performance.md come from.

Benchmarks stand beside the tests and are not installed: they need a checkout.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import typer

FOLDER = Path(__file__).parents[2] / "tests" / "benchmarks"


def benchmarks() -> list[str]:
    """Those that begin with how they are called; the other files of the folder are what these share."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if f"halfmoon bench {path.stem}" in _opening(path))


def _opening(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def bench(name: str, arguments: list[str]) -> None:
    """Runs one with its own arguments. Raises typer.BadParameter for an unknown name."""
    if not FOLDER.is_dir():
        raise typer.BadParameter("benchmarks are not installed; run `pip install -e .` in a checkout and call this there")
    if name not in benchmarks():
        raise typer.BadParameter(f"no benchmark {name!r}; there are {', '.join(benchmarks())}")
    sys.argv = [f"halfmoon bench {name}", *arguments]
    sys.path.insert(0, str(FOLDER))  # they share modules, and python may have been told not to look beside a script
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
