"""`halfmoon bench NAME`: runs tests/benchmarks/NAME.py. The figures in docs/performance.md come from these.

Benchmarks are kept beside the tests and are not installed, so they need a checkout.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import typer

FOLDER = Path(__file__).parents[2] / "tests" / "benchmarks"


def benchmarks() -> list[str]:
    """The files that begin with how to call them. The other files of the folder are shared parts."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if f"halfmoon bench {path.stem}" in _opening(path))


def _opening(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def bench(name: str, arguments: list[str]) -> None:
    """Runs a benchmark with its own arguments. Raises typer.BadParameter for an unknown name."""
    if not FOLDER.is_dir():
        raise typer.BadParameter("benchmarks are not installed; run `pip install -e .` in a checkout and call this there")
    if name not in benchmarks():
        raise typer.BadParameter(f"no benchmark {name!r}; there are {', '.join(benchmarks())}")
    sys.argv = [f"halfmoon bench {name}", *arguments]
    sys.path.insert(0, str(FOLDER))  # they share modules, and PYTHONSAFEPATH may keep python from looking beside a script
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
