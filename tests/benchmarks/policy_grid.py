"""`adaptive` against the best coupled cluster and the best static split, cell by cell. Simulated; the worst cell first.

halfmoon bench policy_grid --sizes 2,4 --out grid.json [--trace conversation=conversation_trace.jsonl.xz]
Every run has steps that differ by 3 %, reports that are 50 ms old, and predictors that learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from halfmoon.simulator.grid import LOADS, SHIFTS, SLOS, Cell, CellResult, cells, judge, made
from halfmoon.simulator.replay import ReplayOptions
from halfmoon.simulator.scenario import Scenario, find_cost_model
from halfmoon.simulator.trace import Trace, read_trace

FULL_SIZE = 16  # instances that a recorded trace is for; fewer get as large a share of its sessions
HEAD = [
    "cell",
    "SLO",
    "requests",
    "coupled",
    "split",
    "adaptive",
    "ratio",
    "in SLO at the best baseline's speed",
    "by longest tenth",
    "roles",
]


def row(found: CellResult) -> list[str]:
    return [
        found.cell.title, f"{found.slo.ttft_s:.3g} s / {found.slo.tpot_s * 1e3:.3g} ms", str(found.num_requests),
        f"{found.coupled.speed:.4g} ({found.coupled_form})", f"{found.split.speed:.4g} ({found.split_form})", f"{found.policy.speed:.4g}",
        f"{found.ratio:.3f}", f"{found.attainment:.1%}", f"{found.attainment_by_tbt:.1%}", str(found.num_role_changes),
    ]  # fmt: skip


def plain(found: CellResult) -> dict[str, object]:
    """Speeds in full."""
    return {
        "load": found.cell.load, "num_instances": found.cell.num_instances, "slo": found.cell.slo_name, "cost_model": found.cell.cost.name,
        "ttft_slo_s": found.slo.ttft_s, "tpot_slo_s": found.slo.tpot_s, "num_requests": found.num_requests,
        "coupled": found.coupled._asdict() | {"form": found.coupled_form}, "split": found.split._asdict() | {"form": found.split_form},
        "adaptive": found.policy._asdict(), "ratio": found.ratio, "attainment": found.attainment,
        "attainment_by_tbt": found.attainment_by_tbt, "num_role_changes": found.num_role_changes,
    }  # fmt: skip


def load_of(cell: Cell, traces: dict[str, Trace], window_s: float, seed: int) -> tuple[Trace, ReplayOptions]:
    if cell.load not in traces:
        return made(cell.load, cell.num_instances, cell.slo_name, cell.cost, seed), ReplayOptions(seed=seed)
    share = min(cell.num_instances / FULL_SIZE, 1.0)
    return traces[cell.load], ReplayOptions(sample=share, dequantise=True, start_s=600.0, duration_s=window_s, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2,4,8,16")
    parser.add_argument("--loads", default=",".join([*LOADS, *SHIFTS]))
    parser.add_argument("--slos", default=",".join(SLOS))
    parser.add_argument("--cost-models", default="h100-8b,a800-70b")
    parser.add_argument("--trace", action="append", default=[], help="NAME=FILE: a recorded load; may be given again")
    parser.add_argument("--window", type=float, default=900.0, help="seconds of a recorded trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; cells that it has already are not run again")
    args = parser.parse_args()
    traces = {name: read_trace(Path(path)) for name, _, path in (pair.partition("=") for pair in args.trace)}
    costs = [find_cost_model(name) for name in args.cost_models.split(",")]
    known: list[dict[str, object]] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else []
    done = {(one["load"], one["num_instances"], one["slo"], one["cost_model"]) for one in known}
    shown: list[CellResult] = []
    for cell in cells([*args.loads.split(","), *traces], [int(size) for size in args.sizes.split(",")], args.slos.split(","), costs):
        if (cell.load, cell.num_instances, cell.slo_name, cell.cost.name) in done:
            continue
        trace, options = load_of(cell, traces, args.window, args.seed)
        base = Scenario(cost=cell.cost, learn=True, step_jitter=0.03, report_s=0.05, seed=args.seed)
        found = judge(cell, trace, base, options)
        shown.append(found)
        known.append(plain(found))
        print(" · ".join(row(found)), file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for found in sorted(shown, key=lambda one: one.ratio):
        print(f"| {' | '.join(row(found))} |")


if __name__ == "__main__":
    main()
