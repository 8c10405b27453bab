"""Runs the commands in docs/scheduling.md whose output is the table below them, and compares.

halfmoon bench scheduling_figures --traces FOLDER [--only routing] [--long] [--write]
A fence with the language "figures" holds one command; the table that follows it is what it prints. Commands run in FOLDER, where the
traces are. Figures may differ by 2 % or one unit of their last digit. --write puts what was printed into the page.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"
FENCE = re.compile(r"```figures(?P<kind>-quick|-long)?\n(?P<command>.*?)\n```\n\n(?P<table>(?:\|[^\n]*\n)+)", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
RELATIVE = 0.02


class Figures(NamedTuple):
    command: str
    table: str
    kind: str  # "quick": for the tests too; "long": takes half an hour, and is run only where it is asked for; else ""

    @property
    def traces(self) -> list[str]:
        return re.findall(r"[\w.]+\.jsonl\.xz", self.command)


def figures(page: str) -> list[Figures]:
    return [Figures(" ".join(one["command"].split()), one["table"], (one["kind"] or "")[1:]) for one in FENCE.finditer(page)]


def printed(command: str, folder: Path) -> str:
    """The table. Raises CalledProcessError."""
    words = shlex.split(command)
    assert words[0] == "halfmoon", command
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return "".join(f"{line}\n" for line in done.stdout.splitlines() if line.startswith("|"))


def differences(said: str, found: str) -> list[str]:
    """In words; rows may stand in any order."""
    mine, theirs = (sorted(_plain(table)) for table in (said, found))
    if len(mine) != len(theirs):
        return [f"{len(mine)} rows are said, {len(theirs)} were printed"]
    return [f"said    {one}\nprinted {other}" for one, other in zip(mine, theirs, strict=True) if not _alike(one, other)]


def _plain(table: str) -> list[str]:
    return [line.replace("**", "") for line in table.splitlines() if not re.fullmatch(r"[|\-]+", line)]


def _alike(one: str, other: str) -> bool:
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    return all(_near(mine, theirs) for mine, theirs in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True))


def _near(mine: str, theirs: str) -> bool:
    _, _, decimals = mine.partition(".")
    last_digit = 10.0 ** -len(decimals) if decimals else 0.0
    return abs(float(mine) - float(theirs)) <= max(RELATIVE * abs(float(mine)), 1.01 * last_digit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path.cwd(), help="the folder with the recorded traces")
    parser.add_argument("--only", default="", help="commands that have this in them")
    parser.add_argument("--long", action="store_true", help="those, too, that take half an hour")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    num_wrong = 0
    for one in figures(PAGE.read_text()):
        if args.only not in one.command or (one.kind == "long" and not args.long):
            continue
        missing = [name for name in one.traces if not (args.traces / name).is_file()]
        if missing:
            print(f"skipped, no {', '.join(missing)} in {args.traces}: {one.command}", flush=True)
            continue
        found = printed(one.command, args.traces)
        wrong = differences(one.table, found)
        num_wrong += bool(wrong)
        print(f"{'differs' if wrong else 'as said'}: {one.command}", *wrong, sep="\n", flush=True)
        if args.write and wrong:
            PAGE.write_text(PAGE.read_text().replace(one.table, found))
    raise SystemExit(1 if num_wrong and not args.write else 0)


if __name__ == "__main__":
    main()
