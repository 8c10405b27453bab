"""Whether admissions keep their word: first tokens as they were predicted and as they came. Simulated: one line a cell and admission.

halfmoon bench admission --trace conversation=conversation_trace.jsonl.xz --cells h100-8b/conversation/2p2d/2,20/2.0
A cell is COST_MODEL/LOAD/FORM/TTFT_S,TPOT_MS/RATE. A load is a recorded trace, whose rate is times its own arrivals, or one that is made
(chat, code, ...), whose rate is times what keeps every instance busy. Steps differ by 3 %, reports are 50 ms old, predictors learn.
measured / predicted is of the first tokens of all requests that were admitted and served.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from prefill_order import scenario_of

from halfmoon.proxy.conductor.placement import Slo
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.grid import LOADS, busy_s
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import Replay, ReplayOptions, replay
from halfmoon.simulator.scenario import Scenario, find_cost_model
from halfmoon.simulator.trace import Trace, read_trace

FULL_SIZE = 16  # instances that a recorded trace is for; fewer get as large a share of its sessions
HEAD = ["cost model", "load", "form", "SLO", "rate", "admission", "requests", "admitted", "measured / predicted p50 / p90",
        "measured / promised p50 / p90", "late", "in SLO"]  # fmt: skip


class Cell(NamedTuple):
    cost_model: str
    load: str
    form: str
    slo: Slo
    rate: float

    @classmethod
    def parse(cls, text: str) -> Cell:
        cost_model, load, form, slo, rate = text.split("/")
        ttft_s, tpot_ms = slo.split(",")
        return cls(cost_model, load, form, Slo(float(ttft_s), float(tpot_ms) / 1e3), float(rate))


def load_of(cell: Cell, scenario: Scenario, traces: dict[str, Trace], seconds: float, seed: int) -> Replay:
    if cell.load in traces:
        share = scenario.num_instances / FULL_SIZE
        window = {"start_s": 600.0, "duration_s": seconds * cell.rate, "dequantise": True}
        return replay(traces[cell.load], ReplayOptions(speed=cell.rate, sample=min(share, 1.0), seed=seed, **window))  # type: ignore[arg-type]
    shape = LOADS[cell.load]
    rate = cell.rate * scenario.num_instances / busy_s(shape.num_input_tokens, shape.num_output_tokens, scenario.cost)
    return replay(shape.make(round(rate * seconds), rate, seed), ReplayOptions())


def row(cell: Cell, admission: str, result: Result) -> list[str]:
    served = [one for one in result.rows if one.outcome == "done"]
    ratios = np.array([one.ttft_s / one.predicted_ttft_s for one in served if one.predicted_ttft_s > 0] or [np.nan])
    promised = np.array([one.ttft_s / one.promised_ttft_s for one in served if one.promised_ttft_s > 0] or [np.nan])
    late = sum(one.ttft_s > cell.slo.ttft_s for one in served)
    num_admitted = result.num_requests - result.num_rejected("at_arrival")
    return [
        cell.cost_model, cell.load, cell.form, f"{cell.slo.ttft_s:g} s / {cell.slo.tpot_s * 1e3:g} ms", f"{cell.rate:g}", admission,
        str(result.num_requests), f"{num_admitted / result.num_requests:.1%}",
        *(" / ".join(f"{value:.2f}" for value in np.percentile(found, (50, 90))) for found in (ratios, promised)),
        f"{late / max(len(served), 1):.1%}", f"{result.attainment(cell.slo):.1%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", required=True, help="with blanks between them")
    parser.add_argument("--admissions", default="none,early_rejection,predictive")
    parser.add_argument("--trace", action="append", default=[], help="NAME=FILE: a recorded load; may be given again")
    parser.add_argument("--seconds", type=float, default=120.0, help="that a load lasts")
    parser.add_argument("--order", default="short")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    traces = {name: read_trace(Path(path)) for name, _, path in (pair.partition("=") for pair in args.trace)}
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for cell in map(Cell.parse, args.cells.split()):
        honest = {"learn": True, "step_jitter": 0.03, "report_s": 0.05, "seed": args.seed, "order": args.order, "slo": cell.slo}
        scenario = scenario_of(cell.form, cell.cost_model, **honest)
        scenario = scenario.with_(one_node=False, cost=find_cost_model(cell.cost_model))
        requests = load_of(cell, scenario, traces, args.seconds, args.seed)
        for admission in args.admissions.split(","):
            found = Result(simulate(scenario.with_(admission=admission), requests))
            print(f"| {' | '.join(row(cell, admission, found))} |", flush=True)


if __name__ == "__main__":
    main()
