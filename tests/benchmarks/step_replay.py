"""A window of a trace through one coupled worker's step decisions, over a cost model of a card: what sizes and order make of it.

    halfmoon bench step_replay --trace conversation_trace.jsonl.xz --start 2000 --count 200 --speeds 0.5,0.7 --constant 512,2048

The worker's own code decides: StepFit learns from the steps as they come, ChunkSizer sizes, token_target_s says what a step may take,
arrange says who is next. Every request is told an SLO, one SLO a run. Beside it, with --constant: chunks of that many tokens, decode
tokens among them, first come, first served, as engines without an SLO have it. The card is a formula, here an H200 with Llama-3.1-8B's
shape, whose constants are from docs/engine_cuda.md: the larger of the weights' read and the products of the graph's rows, attention,
context, a fixed part, and 2 % of noise. Prints, for each run, the share of requests within each SLO, by mean TPOT.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfmoon.deploy.load.summary import Slo
from halfmoon.deploy.load.trace_plan import TraceOptions, trace_plan
from halfmoon.engine.graph_sizes import MAX_CAPTURED_ROWS
from halfmoon.engine.mixed_graph import MAX_CHUNKS, row_counts
from halfmoon.protocol.timing.chunk_sizer import LEAST_CHUNK_TOKENS, ChunkSizer, token_target_s
from halfmoon.protocol.timing.step_cost import ChunkWork, StepCost, StepWork, attention_of, with_chunks
from halfmoon.protocol.timing.step_fit import StepFit
from halfmoon.protocol.timing.turns import Turn, arrange
from halfmoon.proxy.conductor.queue_order import first_token_due_s, queue_order
from halfmoon.simulator.trace import read_trace

READ_S, FIXED_S, ROW_S, PAIR_S, LEAST_PAIR_S, DECODE_S, CONTEXT_S = 3.9e-3, 1.4e-3, 24.6e-6, 0.95e-9, 1e-7, 20e-6, 33e-9
NOISE, HICCUPS, HICCUP_S = 0.02, 0.002, 0.05  # of a step; the share of steps that are late, and by how much at most
PRIOR = StepCost(5.2e-3, 4e-3, 2.2e-5, 2e-9, 4.3e-5, 1.3e-7)  # as a calibration finds it
MOST_TOKENS = 2048
ROWS = row_counts(MAX_CAPTURED_ROWS)


@dataclass(eq=False)
class Request:
    arrival_s: float
    num_tokens: int  # to be computed
    num_output_tokens: int
    due_s: float = math.inf
    place: tuple[int, int] = (0, 0)
    num_computed: int = 0
    num_given: int = 0
    first_s: float = math.inf
    last_s: float = math.inf

    @property
    def work(self) -> ChunkWork:
        return ChunkWork(self.num_computed, self.num_tokens - self.num_computed)

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(self.num_given, 1)


def work_s(num_tokens: int) -> float:
    return num_tokens * ROW_S + attention_of(num_tokens, 0) * PAIR_S


def card_s(work: StepWork, chunks: list[tuple[int, int]], rng: random.Random) -> float:
    """chunks: (prefix tokens, tokens). A short chunk over much context is bound by the walk along it."""
    num_rows = work.num_chunk_tokens + work.num_decodes
    padded = ROWS[bisect.bisect_left(ROWS, num_rows)] if work.num_chunk_tokens and num_rows <= ROWS[-1] else num_rows
    attention_s = sum(max(attention_of(size, prefix) * PAIR_S, (prefix + size) * LEAST_PAIR_S) for prefix, size in chunks)
    rest_s = work.num_decodes * DECODE_S + work.num_context_tokens * CONTEXT_S
    seconds = (max(READ_S, padded * ROW_S) + FIXED_S + attention_s + rest_s) * rng.gauss(1.0, NOISE)
    return seconds + (rng.random() * HICCUP_S if rng.random() < HICCUPS else 0.0)


def replay(requests: list[Request], slo: Slo | None, constant: int, seed: int) -> list[Request]:
    """The same requests, with when their first and last tokens came. slo: that they are told; None: chunks of `constant` tokens."""
    rng, fit = random.Random(seed), StepFit(PRIOR)
    sizer = ChunkSizer(most=MOST_TOKENS, most_beside=MOST_TOKENS, least=LEAST_CHUNK_TOKENS, row_counts=ROWS)
    now, coming = 0.0, sorted(requests, key=lambda one: one.arrival_s)
    waiting: list[Request] = []
    running: list[Request] = []
    while coming or waiting or running:
        now = max(now, coming[0].arrival_s) if not (waiting or running) else now
        while coming and coming[0].arrival_s <= now:
            waiting.append(_arrived(coming.pop(0), slo))
        context = sum(one.num_tokens + one.num_given for one in running)
        decodes = StepWork(num_decodes=len(running), num_context_tokens=context)
        target_s = math.inf
        if slo is not None and waiting:
            target_s = min((token_target_s(slo.tpot_s, one.num_given, now - one.first_s) for one in running), default=math.inf)
            pace = sizer.pace(fit, decodes, target_s)
            turns = [Turn(one.place, one.due_s, pace * sizer.alone_s(fit, one.work)) for one in waiting]
            waiting = [waiting[index] for index in arrange(turns, now).order]
        works = [one.work for one in waiting[:MAX_CHUNKS]]
        sized = sizer.num_tokens(fit, decodes, target_s, works) if slo is not None else max(constant - len(running), 0)
        work, sizes = with_chunks(decodes, works, sized), _sizes(works, sized)
        seconds = card_s(work, [(prefix, size) for (prefix, _), size in zip(works, sizes, strict=False)], rng)
        fit.observe(work, seconds)
        now += seconds
        for one in running:
            one.num_given, one.last_s = one.num_given + 1, now
        running = [one for one in running if one.num_given < one.num_output_tokens - 1]
        for one, size in zip(waiting[: len(sizes)], sizes, strict=True):
            one.num_computed += size
            if one.num_computed == one.num_tokens:
                one.first_s = one.last_s = now
                running += [one] if one.num_output_tokens > 1 else []
        waiting = [one for one in waiting if one.num_computed < one.num_tokens]
    return requests


def _arrived(one: Request, slo: Slo | None) -> Request:
    ttft_s = slo.ttft_s if slo is not None else math.inf
    named: dict[str, Any] = {"arrival_s": one.arrival_s, "ttft_slo_s": ttft_s, "work_s": work_s(one.num_tokens)}
    one.place = queue_order("fcfs" if slo is None else "short", **named), 0
    one.due_s = first_token_due_s("short", **named)
    return one


def summary(done: list[Request], slos: list[Slo]) -> dict[str, Any]:
    ttft = sorted(one.first_s - one.arrival_s for one in done)
    in_slo = {str(slo): sum(one.first_s - one.arrival_s <= slo.ttft_s and one.tpot_s <= slo.tpot_s for one in done) for slo in slos}
    return {
        "ttft_s": {f"p{share}": round(ttft[int(share / 100 * (len(ttft) - 1))], 2) for share in (50, 90, 99, 100)},
        "in_slo_percent": {slo: round(100 * count / len(done), 1) for slo, count in in_slo.items()},
    }


def _sizes(works: list[ChunkWork], num_tokens: int) -> list[int]:
    sizes: list[int] = []
    for work in works:
        size = min(work.num_left_tokens, num_tokens - sum(sizes))
        if size:
            sizes.append(size)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="halfmoon bench step_replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--start", type=int, default=2000)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--speeds", default="0.5,0.7")
    parser.add_argument("--max-input", type=int, default=65536)
    parser.add_argument("--max-output", type=int, default=400)
    parser.add_argument("--constant", default="", help="tokens a step, with commas: runs without an SLO beside")
    parser.add_argument("--slo", action="append", help="TTFT:TPOT in seconds; each is told in a run of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = TraceOptions(
        start=arguments.start, count=arguments.count, max_input=arguments.max_input, max_output=arguments.max_output, seed=1
    )
    planned = trace_plan(read_trace(arguments.trace), options).requests
    slos = [Slo.parse(text) for text in arguments.slo or ("1:0.015", "2:0.02", "5:0.03", "5:0.05", "10:0.05")]
    told = [(f"told {slo}", slo, 0) for slo in slos]
    runs = told + [(f"constant {tokens}", None, int(tokens)) for tokens in arguments.constant.split(",") if tokens]
    found: list[dict[str, Any]] = []
    for speed, (name, slo, constant) in itertools.product(map(float, arguments.speeds.split(",")), runs):
        began = planned[0].arrival_s
        requests = [Request((one.arrival_s - began) / speed, one.num_input_tokens, one.num_output_tokens) for one in planned]
        done = replay(requests, slo, constant, arguments.seed)
        found.append({"speed": speed, "run": name, **summary(done, slos)})
        print(json.dumps(found[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
