"""The files of a run: JSON with everything, CSV with a line for each request. Files of several runs can be merged by their arms."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from ...protocol.errors import ConfigError

FORMAT = "halfmoon-load-1"
SAME_OPTIONS = ("seed", "vocab_size", "api", "prompts", "ignore_eos", "extra_body", "measure_from_s", "measure_to_s")
Arms = list[dict[str, Any]]


def write_json(arms: Arms, path: Path) -> None:
    path.write_text(json.dumps({"format": FORMAT, "arms": arms}, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Arms:
    """Raises ConfigError for a file that is not from a run."""
    try:
        found: Any = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no file {path}; --merge takes the JSON files of earlier runs") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    run = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    if run.get("format") != FORMAT:
        raise ConfigError(f"{path} was not written by `halfmoon bench serve --out`")
    return run["arms"]


def merge(paths: Sequence[Path]) -> Arms:
    """All arms of the files. If a name comes again in a later file, it gets a number."""
    arms: Arms = []
    for path in paths:
        for arm in read_json(path):
            names = {other["name"] for other in arms}
            name, number = arm["name"], 2
            while name in names:
                name, number = f"{arm['name']} ({number})", number + 1
            arms.append(arm | {"name": name})
    return arms


def different_loads(arms: Arms) -> list[str]:
    """The points in which the arms' loads differ, so that their figures can't be compared. Empty if they can."""
    loads = [arm["plan"] | {name: arm["options"].get(name) for name in SAME_OPTIONS} for arm in arms]
    names = sorted({name for load in loads for name in load})
    return [name for name in names if len({json.dumps(load.get(name)) for load in loads}) > 1]


def write_csv(arms: Arms, path: Path) -> None:
    """Leaves out the arrivals of single chunks, which are in the JSON."""
    rows = list(_rows(arms))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _rows(arms: Arms) -> Iterable[dict[str, Any]]:
    for arm in arms:
        for window in arm["windows"]:
            for request in window["requests"]:
                plain = {name: value for name, value in request.items() if name not in ("arrivals_s", "phases")}
                yield {"arm": arm["name"], window["kind"]: window["factor"]} | plain
