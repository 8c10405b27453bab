"""python -m halfmoon.deploy.dashboards.write [FOLDER]: the dashboards as Grafana reads them. A test compares what is committed."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from .conductor import conductor
from .kv import kv
from .phases import phases
from .slo import slo

FOLDER = Path(__file__).parents[1] / "grafana"


def boards() -> dict[str, Dashboard]:
    """By the stem of their file."""
    return {"slo": slo(), "pd": phases(), "kv": kv(), "conductor": conductor()}


def write(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, board in boards().items():
        path = folder / f"{name}.json"
        path.write_text(JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n")
        found.append(path)
    return found


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(written)
