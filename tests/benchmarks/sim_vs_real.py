"""The simulator against the cluster that it models, on CPU: the same requests, the same policy, a cost model that was measured.

    halfmoon bench sim_vs_real --repeats 3 --json sim_vs_real.json

One run starts a 2P2D cluster of the demo model on this machine. Each repeat sends a seeded trace through the proxy in an open loop, and
simulates it with what profiles (halfmoon profile) before and after measured. The trace has sessions whose prompts grow, so that prefixes
hit, and Poisson arrivals. What other processes of the machine took meanwhile is counted; where it is shared, --max-others waits for calm.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from halfmoon.client import AsyncClient, Delta
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.profile import MAX_NEW, Profile, profile
from halfmoon.deploy.profile_fit import Points, fit
from halfmoon.deploy.profile_target import look
from halfmoon.deploy.profile_timeline import Sample, Timeline
from halfmoon.deploy.ray_session import ray_session
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import Replay
from halfmoon.simulator.scenario import Scenario
from halfmoon.simulator.trace import TraceRequest

BLOCK_SIZE = 64
KV_TOKENS = 32768  # of every worker's pages
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
VOCAB_SIZE = int(json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"])
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one request, seconds and tokens; from the moment at which it was due."""

    ttft_s: float
    tpot_s: float
    queued_s: float  # until the prefill began
    prefill_s: float
    num_input_tokens: int
    num_cached_tokens: int

    @classmethod
    def of(cls, sample: Sample, due: float) -> Outcome:
        moments = sample.token_moments
        tpot_s = (moments[-1] - moments[0]) / (len(moments) - 1)
        queued_s = sample.prefill.start - due
        return cls(moments[0] - due, tpot_s, queued_s, sample.phases.prefill_s, sample.num_prompt_tokens, sample.num_cached_tokens)


@dataclasses.dataclass(frozen=True)
class Slo:
    ttft_s: float
    tpot_s: float

    @property
    def title(self) -> str:
        return f"{self.ttft_s:g} s, {self.tpot_s * 1e3:g} ms"


SLOS = (Slo(0.15, 0.01), Slo(0.3, 0.015), Slo(0.6, 0.03))  # the second is the one to look at; chosen before any run


# the trace


def make_trace(num_requests: int, rate: float, seed: int) -> list[TraceRequest]:
    """Poisson arrivals at rate a second. Three in ten open a session (a document of 2 to 12 blocks behind a prompt that all share),
    the others go on with one that has been silent for 2 s: its prompt, and 1 to 4 blocks more. A tail of less than a block is nobody's.
    """
    rng = random.Random(seed)
    shared, fresh = [0, 1], 2
    sessions: list[tuple[float, list[int]]] = []
    requests: list[TraceRequest] = []
    now = 0.0
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        silent = [number for number, (last_s, blocks) in enumerate(sessions) if now - last_s > 2.0 and len(blocks) < 40]
        if silent and rng.random() > 0.3:
            number, num_more = rng.choice(silent), rng.randint(1, 4)
            blocks = sessions[number][1]
        else:
            number, num_more, blocks = len(sessions), rng.randint(2, 12), shared
            sessions.append((now, blocks))
        blocks = [*blocks, *range(fresh, fresh + num_more)]
        fresh += num_more + 1
        sessions[number] = now, blocks
        num_input = len(blocks) * BLOCK_SIZE + rng.randint(1, BLOCK_SIZE - 1)
        requests.append(TraceRequest(now, num_input, rng.randint(16, 64), (*blocks, fresh - 1)))
    return requests


def prompt(request: TraceRequest, salt: int) -> list[int]:
    """Random tokens by block id. salt: another one gives a prompt that no cache has seen."""
    tokens: list[int] = []
    for block in request.block_ids:
        rng = random.Random(salt * 1_000_003 + block)
        tokens += [rng.randrange(VOCAB_SIZE) for _ in range(BLOCK_SIZE)]
    return tokens[: request.num_input_tokens]


# the real cluster


async def replay_real(address: str, requests: Sequence[TraceRequest], salt: int) -> list[tuple[float, Sample]]:
    """Every request at its time, whatever became of those before it. When it was due, and what was seen."""
    prompts = [prompt(request, salt) for request in requests]
    with Progress(transient=True) as progress:
        task = progress.add_task("replay", total=len(requests))
        async with AsyncClient(address) as client:
            start = time.perf_counter() + 0.5

            async def send(request: TraceRequest, tokens: list[int]) -> tuple[float, Sample]:
                due = start + request.arrival_s
                await asyncio.sleep(due - time.perf_counter())
                found = await one(client, tokens, request.num_output_tokens)
                progress.advance(task)
                return due, found

            return await asyncio.gather(*(send(request, tokens) for request, tokens in zip(requests, prompts, strict=True)))


async def one(client: AsyncClient, tokens: list[int], num_output_tokens: int) -> Sample:
    moments: list[float] = []
    sent = time.perf_counter()
    stream = client.stream(token_ids=tokens, max_tokens=num_output_tokens, temperature=0.0, ignore_eos=True)
    async for event in stream:
        moments += [time.perf_counter()] * len(event.token_ids) if isinstance(event, Delta) else []
    completion = await stream.completion()
    usage = completion.usage
    return Sample(sent, tuple(moments), usage.num_prompt_tokens, usage.num_cached_tokens, 0, completion.phases)


# the simulated one


def replay_simulated(requests: Sequence[TraceRequest], cost: CostModel) -> list[Outcome]:
    scenario = Scenario(
        cost=cost, num_prefill=2, num_decode=2, policy="cache_aware", order="fair", one_node=True, block_size=BLOCK_SIZE,
        page_size=BLOCK_SIZE, max_tokens_per_step=PrefillConfig().max_tokens_per_step, max_running=DecodeConfig().max_running,
    )  # fmt: skip
    rows = Result(simulate(scenario, Replay(list(requests), []))).rows
    return [
        Outcome(
            row.ttft_s, row.tpot_s, row.prefill_start_s - row.arrival_s, row.prefill_done_s - row.prefill_start_s,
            row.num_input_tokens, row.num_cached_tokens,
        )
        for row in rows
    ]  # fmt: skip


# what is compared


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, values in (("ttft", [one.ttft_s for one in outcomes]), ("tpot", [one.tpot_s for one in outcomes])):
        found |= {f"{name}_mean_s": float(np.mean(values))}
        found |= {f"{name}_p{share}_s": float(np.percentile(values, share)) for share in (50, 90)}
    found["of the ttft: queued, mean_s"] = float(np.mean([one.queued_s for one in outcomes]))
    found["of the ttft: prefill, mean_s"] = float(np.mean([one.prefill_s for one in outcomes]))
    found["of the ttft: rest, mean_s"] = float(np.mean([one.ttft_s - one.queued_s - one.prefill_s for one in outcomes]))
    for slo in SLOS:
        inside = [one.ttft_s <= slo.ttft_s and one.tpot_s <= slo.tpot_s for one in outcomes]
        found[f"in SLO {slo.title}"] = sum(inside) / len(inside)
    found["hit_ratio"] = sum(one.num_cached_tokens for one in outcomes) / sum(one.num_input_tokens for one in outcomes)
    return found


def cpu_s() -> tuple[float, float]:
    """Seconds that the machine's cores worked so far: this process and what it started; all others."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    ours = 0.0
    for pid, used_s in seconds.items():
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        ours += used_s if ancestor else 0.0
    ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return ours, (sum(ticks) - ticks[3] - ticks[4]) / CLOCK_TICKS - ours


class Disturbed(Exception):
    """Others took more of the machine than was to be borne."""


async def watched(work: Coroutine[Any, Any, Found], most_s: float = math.inf) -> tuple[Found, dict[str, float]]:
    """And the cores that it kept busy, and others beside it. Raises Disturbed as soon as others took most_s seconds of the cores."""
    before, begun = cpu_s(), time.monotonic()
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait([task], timeout=2.0))[0]:
        if cpu_s()[1] - before[1] > most_s:
            task.cancel()
            await asyncio.wait([task])
            raise Disturbed
    after, wall_s = cpu_s(), time.monotonic() - begun
    return await task, {"ours": (after[0] - before[0]) / wall_s, "others": (after[1] - before[1]) / wall_s}


async def undisturbed(
    make: Callable[[int], Coroutine[Any, Any, Found]], length_s: float, max_others: float
) -> tuple[Found, dict[str, float]]:
    """make(attempt), again and again until others took less than max_others cores while it ran. Each begins after 3 s of calm."""
    for attempt in itertools.count():
        while (await watched(asyncio.sleep(3.0)))[1]["others"] > max_others:
            pass
        try:
            found, cores = await watched(make(attempt), length_s * max_others)
        except Disturbed:
            continue
        return found, cores | {"attempts": attempt + 1}
    raise AssertionError("it goes on until it returns")


# the run


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = ClusterConfig(
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, policy="cache_aware"),
        prefill=PrefillConfig(num_workers=2, kv_capacity_tokens=KV_TOKENS),
        decode=DecodeConfig(num_workers=2, kv_capacity_tokens=KV_TOKENS),
        store=StoreConfig(arena_bytes=2**30),  # everything that a replay's sessions share stays
    )
    repeats: list[dict[str, Any]] = []
    with ray_session() as nodes:
        async with running_cluster(config, nodes) as supervisor:
            address = supervisor.grpc_address
            async with AsyncClient(address) as client:
                target = await look(client)
            before = await profiled(address, arguments)
            for seed in range(arguments.seed, arguments.seed + arguments.repeats):
                requests = make_trace(arguments.requests, arguments.rate, seed)
                real, cores = await undisturbed(partial(send_trace, address, requests, seed), requests[-1].arrival_s, arguments.max_others)
                after = await profiled(address, arguments)
                repeats.append({"seed": seed, "cores_replay": cores, **compared(requests, real, before, after, target.node_of)})
                before = after
                Console().print(table_of(repeats[-1:], f"seed {seed}"))
                if arguments.json:
                    write(arguments, repeats)
    return repeats


async def profiled(address: str, arguments: argparse.Namespace) -> tuple[Profile, dict[str, float]]:
    seconds = arguments.profile_seconds
    return await undisturbed(lambda attempt: profile(address, seconds=seconds), seconds, arguments.max_others)


async def send_trace(address: str, requests: Sequence[TraceRequest], seed: int, attempt: int) -> list[tuple[float, Sample]]:
    return await replay_real(address, requests, salt=seed + 1000 * attempt)


def compared(
    requests: Sequence[TraceRequest],
    real: list[tuple[float, Sample]],
    before: tuple[Profile, dict[str, float]],
    after: tuple[Profile, dict[str, float]],
    node_of: dict[str, str],
) -> dict[str, Any]:
    """Simulated with one cost model of what the profiles before and after measured. The others tell where a difference comes from:
    with what prefills and steps of the replay itself took, the machine cannot have changed in between, and the simulator is left.
    """
    profiles = before[0].points + after[0].points
    timeline = Timeline([sample for _, sample in real], node_of)
    own = Points(timeline.prefill_points(MAX_NEW), timeline.step_points(), [*timeline.request_points(), *profiles.requests])
    cost = fit(profiles, before[0].facts)
    costs = {
        "simulated": cost,
        "with the replay's own costs": fit(own, before[0].facts),
        "without shared cores": dataclasses.replace(cost, num_cores=0.0),
        "without calls and look-ups": dataclasses.replace(cost, request_s=0.0),
    }
    found: dict[str, Any] = {"real": figures([Outcome.of(sample, due) for due, sample in real])}
    found |= {name: figures(replay_simulated(requests, variant)) for name, variant in costs.items()}
    cores = {who: (before[1][who] + after[1][who]) / 2 for who in ("ours", "others")}
    return {"figures": found, "cost_models": {name: dataclasses.asdict(model) for name, model in costs.items()}, "cores_profile": cores}


def table_of(repeats: Sequence[dict[str, Any]], title: str) -> Table:
    """Medians over the repeats, and the range where there are several."""
    names = list(repeats[0]["figures"])
    table = Table("", *names, title=title, title_justify="left")
    for figure in repeats[0]["figures"]["real"]:
        table.add_row(figure.removesuffix("_s"), *(cell(figure, [repeat["figures"][name][figure] for repeat in repeats]) for name in names))
    for phase in ("cores_profile", "cores_replay"):
        ours, others = (statistics.median(repeat[phase][who] for repeat in repeats) for who in ("ours", "others"))
        table.add_row(f"{phase}: ours + others", f"{ours:.2f} + {others:.2f}")
    return table


def cell(figure: str, values: Sequence[float]) -> str:
    def text(value: float) -> str:
        return f"{value * 1e3:.1f} ms" if figure.endswith("_s") else f"{value:.1%}"

    middle = text(statistics.median(values))
    return f"{middle} ({text(min(values))} to {text(max(values))})" if len(values) > 1 else middle


def environment() -> dict[str, object]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("halfmoon", "torch", "ray", "grpcio", "protobuf", "numpy")},
        "commit": git.stdout.strip(),
    }


def write(arguments: argparse.Namespace, repeats: Sequence[dict[str, Any]]) -> None:
    asked = {name: str(value) for name, value in vars(arguments).items()}
    arguments.json.write_text(json.dumps({"environment": environment(), "arguments": asked, "repeats": repeats}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3.0, help="arrivals a second")
    parser.add_argument("--repeats", type=int, default=3, help="profile, replay and simulation, each with a trace of its own")
    parser.add_argument(
        "--max-others", type=float, default=math.inf, help="profiles and replays beside which others took more cores are done again"
    )
    parser.add_argument("--profile-seconds", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    repeats = asyncio.run(measure(arguments))
    Console().print(table_of(repeats, f"{arguments.requests} requests at {arguments.rate:g} a second, 2P2D, {len(repeats)} repeats"))


if __name__ == "__main__":
    main()
