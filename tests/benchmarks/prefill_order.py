"""What the order of prefill queues does to first tokens under load. Simulated: one line a form, speed, SLO and order.

halfmoon bench prefill_order --trace conversation_trace.jsonl.xz --forms 1,1p1d --speeds 0.5,0.8
Windows of a trace as `bench serve` cuts them: prompts up to 65,536 tokens, answers cut at 400, the clock's ticks spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np

from halfmoon.proxy.conductor.placement import Slo
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import ReplayOptions, replay
from halfmoon.simulator.scenario import Scenario, find_cost_model
from halfmoon.simulator.trace import Trace, read_trace

MAX_INPUT, MAX_OUTPUT = 65_536, 400


def cut(trace: Trace) -> Trace:
    kept = [one for one in trace.requests if one.num_input_tokens <= MAX_INPUT]
    return dataclasses.replace(
        trace, requests=tuple(one._replace(num_output_tokens=min(one.num_output_tokens, MAX_OUTPUT)) for one in kept)
    )


def scenario_of(form: str, cost_model: str, **changes: object) -> Scenario:
    """form: 2 coupled instances are "2", a split is "1p1d", with roles that change "adaptive:1p1d". Raises SystemExit."""
    found = re.fullmatch(r"(\d+)|(adaptive:)?(\d+)p(\d+)d", form)
    if found is None:
        raise SystemExit(f"no form {form!r}; write 2, 1p1d or adaptive:1p1d")
    coupled, adaptive, num_prefill, num_decode = found.groups()
    return Scenario(
        cost=find_cost_model(cost_model), coupled=bool(coupled), num_prefill=int(coupled or num_prefill), num_decode=int(num_decode or 0),
        policy="adaptive" if adaptive else "kvcache_centric", one_node=True, page_size=64, max_running=256, **changes,  # type: ignore[arg-type]
    )  # fmt: skip


def line(result: Result, slos: list[Slo]) -> str:
    """TTFT, TPOT, % of the requests in each SLO by the mean TPOT, and in the first by the longest tenth of gaps."""
    ttft, tpot, tail = (np.array([getattr(row, name) for row in result.rows]) for name in ("ttft_s", "tpot_s", "tbt_s"))
    shown = " / ".join(f"{value:.2f}" for value in np.percentile(ttft, (50, 90, 99)))
    paces = " / ".join(f"{value * 1e3:.1f}" for value in np.percentile(tpot, (50, 90, 99)))
    within = [f"{np.mean((ttft <= slo.ttft_s) & (tpot <= slo.tpot_s)):.1%}" for slo in slos]
    by_tail = np.mean((ttft <= slos[0].ttft_s) & (tail <= slos[0].tpot_s))
    return " | ".join([str(len(ttft)), shown, f"{ttft.max():.1f}", paces, *within, f"{by_tail:.1%}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--forms", default="1,1p1d")
    parser.add_argument("--speeds", default="0.3,0.5,0.8")
    parser.add_argument("--orders", default="fair,fcfs,edf,late,short")
    parser.add_argument("--slos", default="5/50", help="TTFT in s / TPOT in ms, told to the cluster; with commas")
    parser.add_argument("--seconds", type=float, default=600.0, help="that the load lasts")
    parser.add_argument("--start", type=float, default=600.0, help="of the window, in trace time")
    parser.add_argument("--chunk", type=int, default=0, help="a constant in place of a size a step")
    parser.add_argument("--cost-model", default="h100-8b")
    args = parser.parse_args()
    trace = cut(read_trace(args.trace))
    slos = [Slo(float(ttft), float(tpot) / 1e3) for ttft, tpot in (pair.split("/") for pair in args.slos.split(","))]
    titles = [f"{slo.ttft_s:g} s/{slo.tpot_s * 1e3:g} ms" for slo in slos]
    head = ["form", "speed", "told", "order", "requests", "TTFT p50 / p90 / p99 s", "longest", "TPOT p50 / p90 / p99 ms"]
    head += [*titles, "told, by tail"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for form in args.forms.split(","):
        for speed in map(float, args.speeds.split(",")):
            options = ReplayOptions(speed=speed, dequantise=True, start_s=args.start, duration_s=args.seconds * speed)
            requests = replay(trace, options)
            for slo, title in zip(slos, titles, strict=True):
                for order in args.orders.split(","):
                    found = Result(simulate(scenario_of(form, args.cost_model, slo=slo, order=order, chunk_tokens=args.chunk), requests))
                    told_first = [slo, *(other for other in slos if other is not slo)]
                    cells = line(found, told_first).split(" | ")
                    places = {id(other): cell for other, cell in zip(told_first, cells[4:-1], strict=True)}
                    shown = [*cells[:4], *(places[id(other)] for other in slos), cells[-1]]
                    print(f"| {form} | {speed:g} | {title} | {order} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
