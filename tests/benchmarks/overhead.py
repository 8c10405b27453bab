"""What the proxy and the hand-off cost on CPU: a request's and a token's time with the engine's own compute taken away.

    halfmoon bench overhead --streams 1,64 --requests 128

One run starts a 1P1D cluster of the demo model and, for each number of concurrent streams, sends the same requests in a closed
loop. Engine compute is what the workers themselves measured (halfmoon_step_seconds: forward pass, sampling, bookkeeping);
overhead is what is left of the client's TTFT and TPOT. CPU seconds of each process say what bounds it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from halfmoon.client import AsyncClient, Delta
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import ray_session
from halfmoon.deploy.supervisor import Supervisor
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import ClusterConfig, ProxyConfig
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Sample:
    ttft_s: float
    tpot_s: float
    prefill_s: float
    phases: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Counters:
    """What the processes have counted so far."""

    cpu_s: dict[str, float]  # member -> user + system
    step_s: dict[str, float]  # role -> sum
    num_steps: dict[str, float]


async def counters(supervisor: Supervisor) -> Counters:
    async with open_channel(supervisor.control_address, supervisor.credentials) as channel:
        status = await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest())
    cpu_s, step_s, num_steps = {}, {}, {}
    for member in status.members:
        cpu_s[member.info.id] = process_cpu_s(member.info.pid)
        if member.info.role == control_pb2.ROLE_STORE:
            continue
        role = member.info.id.partition("-")[0]
        text = urllib.request.urlopen(f"http://{member.info.metrics_address}/metrics").read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "halfmoon_step_seconds_sum":
                    step_s[role] = sample.value
                if sample.name == "halfmoon_step_seconds_count":
                    num_steps[role] = sample.value
    return Counters(cpu_s, step_s, num_steps)


def process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


async def one(client: AsyncClient, prompt: list[int], num_tokens: int) -> Sample:
    start, arrivals = time.perf_counter(), []
    stream = client.stream(token_ids=prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    async for event in stream:
        arrivals += [time.perf_counter()] * len(event.token_ids) if isinstance(event, Delta) else []
    phases = (await stream.completion()).phases
    tpot_s = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
    named = {name: value for name, value in dataclasses.asdict(phases).items() if name.endswith("_s")}
    return Sample(arrivals[0] - start, tpot_s, phases.prefill_s, named)


async def load(address: str, num_streams: int, num_requests: int, prompt_len: int, num_tokens: int) -> list[Sample]:
    """A closed loop: each stream sends its next request when its last one has ended. No prompt comes twice."""
    waiting = iter(range(num_requests))
    samples: list[Sample] = []
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{num_streams} streams", total=num_requests)

        async def stream(client: AsyncClient) -> None:
            for number in waiting:
                prompt = [10 + (number * 131 + i * 7) % 900 for i in range(prompt_len)]
                samples.append(await one(client, prompt, num_tokens))
                progress.advance(task)

        async with AsyncClient(address) as client:
            await asyncio.gather(*(stream(client) for _ in range(num_streams)))
    return samples


def summary(samples: list[Sample], before: Counters, after: Counters, wall_s: float, num_tokens: int) -> dict[str, object]:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    decode_step_s = (after.step_s["decode"] - before.step_s["decode"]) / (after.num_steps["decode"] - before.num_steps["decode"])
    num_generated = len(samples) * num_tokens
    names = samples[0].phases
    return {
        "ttft_ms": 1e3 * median([found.ttft_s for found in samples]),
        "prefill_ms": 1e3 * median([found.prefill_s for found in samples]),
        "request_overhead_ms": 1e3 * median([found.ttft_s - found.prefill_s for found in samples]),
        "tpot_ms": 1e3 * median([found.tpot_s for found in samples]),
        "decode_step_ms": 1e3 * decode_step_s,
        "token_overhead_ms": 1e3 * (median([found.tpot_s for found in samples]) - decode_step_s),
        "tokens_per_s": num_generated / wall_s,
        "phases_ms": {name: 1e3 * median([found.phases[name] for found in samples]) for name in names},
        "cpu_us_per_token": {name: 1e6 * (after.cpu_s[name] - before.cpu_s[name]) / num_generated for name in after.cpu_s},
        "cores_busy": sum(after.cpu_s[name] - before.cpu_s[name] for name in after.cpu_s) / wall_s,
    }


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    results: dict[str, object] = {}
    config = ClusterConfig(proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0))
    with ray_session() as nodes:
        async with running_cluster(config, nodes) as supervisor:
            address = supervisor.grpc_address
            await load(address, 4, 8, arguments.prompt_len, arguments.output_len)  # warm-up, not counted
            for num_streams in arguments.streams:
                before, start = await counters(supervisor), time.perf_counter()
                samples = await load(address, num_streams, max(arguments.requests, num_streams), arguments.prompt_len, arguments.output_len)
                wall_s = time.perf_counter() - start
                results[str(num_streams)] = summary(samples, before, await counters(supervisor), wall_s, arguments.output_len)
    return results


def environment() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("halfmoon", "torch", "ray", "grpcio", "protobuf")},
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 64])
    parser.add_argument("--requests", type=int, default=128, help="for each number of streams")
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    console = Console()
    table = Table(
        "", *(f"{count} streams" for count in results), title=f"{arguments.prompt_len} + {arguments.output_len} tokens, 1P1D, medians"
    )
    for name in (
        "ttft_ms",
        "prefill_ms",
        "request_overhead_ms",
        "tpot_ms",
        "decode_step_ms",
        "token_overhead_ms",
        "tokens_per_s",
        "cores_busy",
    ):
        table.add_row(name, *(f"{found[name]:.2f}" for found in results.values()))  # type: ignore[index]
    for group in ("phases_ms", "cpu_us_per_token"):
        for name in next(iter(results.values()))[group]:  # type: ignore[index]
            table.add_row(f"{group.partition('_')[0]} {name}", *(f"{found[group][name]:.2f}" for found in results.values()))  # type: ignore[index]
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "arguments": str(arguments), "results": results}, indent=2))


if __name__ == "__main__":
    main()
