"""Serving systems side by side on one machine, each under the same requests: vLLM, Halfmoon coupled, prefill/decode, adaptive.

    halfmoon bench serving --shape llama-3.1-8b --trace conversation_trace.jsonl.xz --start 2000 --count 90 --speeds 0.5,0.8 --out OUT
    halfmoon bench serving --device cpu --gpus 2 --arms coupled,1p1d --rates 0.5,1 --requests 20 --input-len 200 --output-len 16 --out OUT

An arm is started, warmed up, put under every window and stopped, until neither a process nor GPU memory of it is left; then the next
one. Results so far are written after each: serving.json, serving.md, and serving.png where matplotlib is there. What no longer fits into
--budget-s is left out, and the table says so. It runs from a checkout that is not installed, too: python tests/benchmarks/serving.py with
halfmoon and its packages on PYTHONPATH (aiohttp and numpy; for Halfmoon's arms what serving needs).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfmoon.deploy.load import results, tables
from halfmoon.deploy.load.arm import ArmOptions, ArmTarget, run_arm
from halfmoon.deploy.load.environment import shown_command
from halfmoon.deploy.load.plan import Plan
from halfmoon.deploy.load.plots import write_png
from halfmoon.deploy.load.summary import Slo
from halfmoon.deploy.load.synthetic_plan import SyntheticOptions, synthetic_plan
from halfmoon.deploy.load.trace_plan import TraceOptions, trace_plan
from halfmoon.protocol.errors import HalfmoonError
from halfmoon.simulator.trace import read_trace

# Python may have been told not to look beside a script; and the arms' processes, which read PYTHONPATH, must not look there
sys.path.insert(0, str(Path(__file__).parent))

from serving_arms import ArmFailed, Model, Spec, make_model, make_specs, running, visible_gpus
from shapes import SHAPES

STOP_S = 20.0  # what stopping an arm takes, of the budget
FIRST_START_S = {"cuda": 150.0, "cpu": 40.0}  # until one arm has been started


def default_arms(num_gpus: int) -> str:
    half = num_gpus // 2
    split = f"{num_gpus - half}p{half}d"
    arms = ["vllm:512", "vllm:2048", "vllm:8192", "coupled", "coupled@20", "coupled:512", "coupled:2048"]
    return ",".join([*arms, *([split, f"adaptive:{split}"] if half else [])])


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="halfmoon bench serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    options.add_argument(
        "--arms", help="with commas: vllm:CHUNK, coupled, coupled:CHUNK, coupled@MS, 1p1d, 2p1d:STEP, adaptive:1p1d; default: all that fit"
    )
    options.add_argument("--gpus", type=int, default=len(visible_gpus()), help="how many each arm takes; with --device cpu: workers")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--model", default="", help="folder with weights; without it and without --shape: Halfmoon's demo model")
    options.add_argument("--shape", choices=sorted(SHAPES), help="a model's shape with made-up weights")
    options.add_argument("--max-model-len", type=int, default=0)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every Halfmoon arm: store.arena_bytes=…")
    options.add_argument("--trace", type=Path)
    options.add_argument("--start", type=int, default=0)
    options.add_argument("--count", type=int, default=100)
    options.add_argument("--speeds", default="1", help="of the trace, a window each")
    options.add_argument("--rates", default="1", help="without a trace: requests a second, a window each")
    options.add_argument("--requests", type=int, default=100)
    options.add_argument("--input-len", default="512")
    options.add_argument("--output-len", default="128")
    options.add_argument("--shared-share", type=float, default=0.0)
    options.add_argument("--max-input", type=int, default=65536)
    options.add_argument("--max-output", type=int, default=400)
    options.add_argument("--warm-up", type=int, default=12)
    options.add_argument("--slo", action="append", help="TTFT:TPOT in seconds; the first is what adaptive is told; default: several")
    options.add_argument(
        "--tell", nargs="?", const="", metavar="SLO,SLO",
        help="load each Halfmoon arm once for each of these, which its requests are told; alone: each --slo",
    )  # fmt: skip
    options.add_argument("--goodput", action="store_true", help="search the highest rate or speed that holds the first SLO")
    options.add_argument("--timeout", type=float, default=120.0, help="of a request")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--budget-s", type=float, default=float("inf"), help="of everything")
    options.add_argument("--start-timeout-s", type=float, default=600.0)
    options.add_argument("--out", type=Path, default=Path("serving"), help="folder")
    return options.parse_args()


def make_plan(arguments: argparse.Namespace) -> tuple[Plan, tuple[float, ...]]:
    """The windows' requests, and their rates or speeds."""
    shared: dict[str, Any] = {
        "max_input": arguments.max_input, "max_output": arguments.max_output, "num_warm_up": arguments.warm_up, "seed": arguments.seed,
    }  # fmt: skip
    if arguments.trace is not None:
        window = TraceOptions(start=arguments.start, count=arguments.count, **shared)
        return trace_plan(read_trace(arguments.trace), window), tuple(map(float, arguments.speeds.split(",")))
    synthetic = SyntheticOptions(
        num_requests=arguments.requests, input_len=arguments.input_len, output_len=arguments.output_len,
        shared_share=arguments.shared_share, **shared,
    )  # fmt: skip
    return synthetic_plan(synthetic), tuple(map(float, arguments.rates.split(",")))


class Run:
    """What has been found so far, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, options: ArmOptions) -> None:
        self._arguments = arguments
        self._plan = plan
        self._options = options
        self._deadline = time.monotonic() + arguments.budget_s
        self._start_s = FIRST_START_S[arguments.device]
        self.arms: results.Arms = []
        self.notes: list[str] = []
        self.num_failed = 0

    def run(self, spec: Spec) -> None:
        shortest_s = self._plan.span_s / max(self._options.factors)
        left_s = self._deadline - time.monotonic() - STOP_S
        if spec.absent:
            self._note(f"{spec.name}: left out, {spec.absent}")
        elif left_s < self._start_s + shortest_s:
            need_s = self._start_s + shortest_s
            self._note(f"{spec.name}: left out, it needs about {need_s:.0f} s and {max(left_s, 0):.0f} s of the budget are left")
        else:
            show(f"{spec.name}: starting")
            try:
                with running(spec, self._arguments.out, min(self._arguments.start_timeout_s, left_s), self._note) as started_s:
                    show(f"{spec.name}: ready after {started_s:.0f} s")
                    self._start_s = started_s
                    self._load(spec, started_s)
            except (ArmFailed, HalfmoonError) as error:
                self.num_failed += 1
                self._note(f"{spec.name}: FAILED, {error}")
        self.write()

    def _load(self, spec: Spec, started_s: float) -> None:
        command = shown_command(["halfmoon", "bench", "serving", *sys.argv[1:]])
        for name, options in self._loads(spec):
            target = ArmTarget(name, tuple(process.url for process in spec.processes))
            options = options.within(self._deadline - time.monotonic() - STOP_S)
            found = asyncio.run(run_arm(target, self._plan, options, command=command))
            self.arms.append(found | {"started_s": started_s, "processes": [list(process.arguments) for process in spec.processes]})
            self.write()
            for grid in tables.joint_tables([found]):
                show(tables.to_markdown(grid))

    def _loads(self, spec: Spec) -> Iterator[tuple[str, ArmOptions]]:
        """What a started arm is put under: its name there and the options. With --tell the same requests again for each SLO told, in other
        tokens, so that none finds an earlier one's prefix."""
        if self._arguments.tell is None or not spec.takes_slo:
            yield spec.name, self._options
            return
        told_slos = tuple(map(Slo.parse, filter(None, self._arguments.tell.split(",")))) or self._options.slos
        for index, slo in enumerate(told_slos):
            told = {"slo": {"ttft": slo.ttft_s, "tpot": slo.tpot_s}}
            yield f"{spec.name}, told {slo}", dataclasses.replace(self._options, extra_body=told, seed=self._options.seed + index)

    def write(self) -> None:
        folder = self._arguments.out
        results.write_json(self.arms, folder / "serving.json")
        (folder / "serving.md").write_text(self.markdown())
        if self.arms and importlib.util.find_spec("matplotlib") is not None:
            write_png(self.arms, folder / "serving.png")

    def markdown(self) -> str:
        if not self.arms:
            return "\n".join(self.notes) + "\n"
        where = self.arms[0]["environment"]
        gpus = ", ".join(where["gpus"]) or "no GPU"
        versions = ", ".join(f"{name} {found}" for name, found in where["versions"].items())
        head = f"{where['at']}; {where['cpu']}, {where['num_cores']} cores; {gpus}; {versions}; commit {where['commit']}"
        parts = [head, f"`{self.arms[0]['command']}`"]
        parts += [f"{grid.title}\n\n{tables.to_markdown(grid)}" for grid in tables.joint_tables(self.arms)]
        parts += tables.goodput_lines(self.arms)
        starts = ", ".join(f"{arm['name']} {arm['started_s']:.0f} s" for arm in self.arms)
        return "\n\n".join([*parts, f"Start to ready: {starts}.", *tables.warnings(self.arms), *self.notes]) + "\n"

    def _note(self, line: str) -> None:
        show(line)
        self.notes.append(line)


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    arguments = parse()
    if arguments.gpus < 1:
        raise SystemExit("no GPU was found; --gpus says how many each arm takes, --device cpu --gpus 2 runs Halfmoon's arms without one")
    arguments.out.mkdir(parents=True, exist_ok=True)
    slos = tuple(map(Slo.parse, arguments.slo or ["5:0.03", "2:0.02", "2:0.03", "5:0.05", "10:0.05"]))
    try:
        plan, factors = make_plan(arguments)
        options = ArmOptions(factors=factors, slos=slos, seed=arguments.seed, timeout_s=arguments.timeout, goodput=arguments.goodput)
    except HalfmoonError as error:
        raise SystemExit(f"serving: {error.message}") from error
    with tempfile.TemporaryDirectory() as folder:
        model_folder = make_model(arguments.shape, Path(folder) / arguments.shape) if arguments.shape else arguments.model
        model = Model(model_folder, arguments.max_model_len, dummy=arguments.shape is not None)
        names = (arguments.arms or default_arms(arguments.gpus)).split(",")
        slo = (slos[0].ttft_s, slos[0].tpot_s)
        specs = make_specs(names, num_gpus=arguments.gpus, device=arguments.device, model=model, settings=arguments.set, slo=slo)
        run = Run(arguments, plan, options)
        for spec in specs:
            run.run(spec)
    show(run.markdown())
    show(f"written to {arguments.out}")
    if run.num_failed:
        raise SystemExit(f"{run.num_failed} of {len(specs)} arms failed")


if __name__ == "__main__":
    main()
