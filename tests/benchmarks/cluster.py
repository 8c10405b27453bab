"""A whole cluster beside one engine alone: 1 prefill and 1 decode worker under Ray, each on a GPU, dummy weights.

    halfmoon bench cluster --out cluster.json
    halfmoon bench cluster --shape small --device cpu --requests 4 --prompt-tokens 300 --output-tokens 16

First the engine alone: its prefill of a prompt, its decode steps, its greedy tokens. Then the cluster, through its gRPC face: no prompt
twice, one request at a time and at a steady rate; at last some prompts again, whose KV the store still has. TTFT is held against the
bare prefill, TPOT against the bare step at the batch that ran, the tokens of requests sent one at a time against the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from shapes import SHAPES, write_shape, write_tokenizer

from halfmoon.client import AsyncClient, Delta
from halfmoon.client.completion import PhaseRecord, Usage
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import ray_session
from halfmoon.engine.kv_schema import kv_schema
from halfmoon.engine.model_config import ModelConfig
from halfmoon.kvstore.arena import FOLDER
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.load_progress import LoadProgress

NUM_COMPARED = 3  # prompts whose tokens are compared
MAX_BATCH = 4  # of the bare steps
MAX_RUNNING = 16
NUM_WARM_UP, NUM_AGAIN = 2, 5
STORED_REQUESTS = 10  # that the arena holds
PAGED_REQUESTS = 8  # that a worker's pages hold
STEADY_SHARE = 0.6  # of what one prefill worker could take

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One request as the client saw it; moments of time.perf_counter()."""

    due: float  # when it was to be sent
    moments: tuple[float, ...]  # of its tokens
    token_ids: tuple[int, ...]
    phases: PhaseRecord
    usage: Usage

    @property
    def ttft_s(self) -> float:
        return self.moments[0] - self.due

    @property
    def tpot_s(self) -> float:
        return (self.moments[-1] - self.moments[0]) / (len(self.moments) - 1)

    @property
    def decoding(self) -> Interval:
        return self.moments[0], self.moments[-1]


# what it is held against


def run_alone(config: ClusterConfig, prompts: Sequence[list[int]], num_output: int) -> dict[str, Any]:
    """In a process of its own. Raises SystemExit where it fails."""
    cases = {
        "options": dataclasses.asdict(config.model),
        "prompts": prompts[:MAX_BATCH],
        "num_compared": min(NUM_COMPARED, len(prompts)),
        "num_output": num_output,
        "max_tokens_per_step": config.prefill.max_tokens_per_step,
        "max_running": config.decode.max_running,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, rows = Path(folder) / "cases.json", Path(folder) / "rows.json"
        asked.write_text(json.dumps(cases))
        command = [sys.executable, str(Path(__file__).with_name("engine_alone.py")), str(asked), str(rows)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("the engine alone did not run")
        alone = json.loads(rows.read_text())
    alone["step_s"] = {int(num_seqs): seconds for num_seqs, seconds in alone["step_s"].items()}
    return alone


def bare_tpot(own: Interval, all_: Iterable[Interval], step_s: dict[int, float]) -> float:
    """Seconds a token that an engine would need for the steps of own: at each moment at the batch of those that were decoded then.

    step_s: batch -> seconds a step; larger batches count as the largest that was measured.
    """
    start, end = own
    inside = [(max(first, start), min(last, end)) for first, last in all_]
    inside = [(first, last) for first, last in inside if first < last]
    edges = sorted({moment for interval in inside for moment in interval})
    num_steps = 0.0
    for left, right in itertools.pairwise(edges):
        batch = sum(first <= left and right <= last for first, last in inside)
        num_steps += (right - left) / step_s[min(batch, max(step_s))]
    return (end - start) / num_steps


# what the cluster does


async def one(client: AsyncClient, prompt: list[int], num_output: int, due: float | None = None) -> Sample:
    if due is not None:
        await asyncio.sleep(due - time.perf_counter())
    sent = time.perf_counter()
    moments: list[float] = []
    stream = client.stream(token_ids=prompt, max_tokens=num_output, temperature=0.0, ignore_eos=True)
    async for event in stream:
        moments += [time.perf_counter()] * len(event.token_ids) if isinstance(event, Delta) else []
    completion = await stream.completion()
    return Sample(sent if due is None else due, tuple(moments), completion.token_ids, completion.phases, completion.usage)


async def one_at_a_time(client: AsyncClient, prompts: Sequence[list[int]], num_output: int) -> list[Sample]:
    samples: list[Sample] = []
    for number, prompt in enumerate(prompts, 1):
        samples.append(await one(client, prompt, num_output))
        if number % 10 == 0 or number == len(prompts):
            measure.show(f"  {number} of {len(prompts)}, TTFT {samples[-1].ttft_s * 1e3:.1f} ms, TPOT {samples[-1].tpot_s * 1e3:.3f} ms")
    return samples


async def steadily(client: AsyncClient, prompts: Sequence[list[int]], num_output: int, rate: float) -> list[Sample]:
    """Each at its time, 1/rate after the one before it, whatever became of those."""
    start = time.perf_counter() + 0.2
    return await asyncio.gather(*(one(client, prompt, num_output, start + number / rate) for number, prompt in enumerate(prompts)))


async def run_cluster(config: ClusterConfig, prompts: list[list[int]], arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """prompts: the warm-up's, then those of both runs."""
    num_output, count = arguments.output_tokens, arguments.requests
    warm, single, steady = prompts[:NUM_WARM_UP], prompts[NUM_WARM_UP : NUM_WARM_UP + count], prompts[NUM_WARM_UP + count :]
    began = time.monotonic()
    with ray_session() as nodes:
        measure.show(f"Ray is up, {sum(node.num_gpus for node in nodes):g} GPUs, {time.monotonic() - began:.1f} s")
        async with running_cluster(config, nodes, notify) as supervisor, AsyncClient(supervisor.grpc_address) as client:
            started_s = time.monotonic() - began
            measure.show(f"the cluster serves, {started_s:.1f} s")
            await one_at_a_time(client, warm, num_output)
            measure.show("one at a time")
            samples = {"one at a time": await one_at_a_time(client, single, num_output)}
            samples["again"] = await one_at_a_time(client, single[-NUM_AGAIN:], num_output)
            measure.show(f"steadily, {rate:.2f} requests/s")
            samples["steadily"] = await steadily(client, steady, num_output, rate)
    return {"started_s": started_s, "samples": samples}


def notify(member_id: str, event: str | LoadProgress) -> None:
    if isinstance(event, str):
        measure.show(f"  {member_id}: {event}")
    elif event.done == event.total:
        measure.show(f"  {member_id}: {event.stage}")


# what is made of it


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p99": float(np.percentile(values, 99)), "min": min(values), "max": max(values)}


def figures(samples: Sequence[Sample], alone: dict[str, Any], kv_bytes_per_token: int) -> dict[str, Any]:
    """Seconds, but the ratios to the bare figures and GB/s.

    KV GB/s: handed_off is what left the prefill worker, by the time from its first chunk to the seal, so mostly under its compute;
    loaded is what a cached prefix brought to its pages, with nothing beside it.
    """
    decoding = [one.decoding for one in samples]
    bare = [bare_tpot(own, decoding, alone["step_s"]) for own in decoding]
    names = [field.name for field in dataclasses.fields(PhaseRecord) if field.name.endswith("_s")]
    pushed = [one.phases.num_bytes_pushed / (one.phases.prefill_s + one.phases.push_s) / 1e9 for one in samples]
    loaded = [one.usage.num_cached_tokens * kv_bytes_per_token / 1e9 for one in samples]
    ttft, tpot = spread([one.ttft_s for one in samples]), spread([one.tpot_s for one in samples])
    prefill_s = alone["prefill_s"]
    return {
        "num_requests": len(samples),
        "ttft_s": ttft,
        "ttft_over_bare_s": {name: ttft[name] - prefill_s for name in ("median", "p99")},
        "ttft_of_bare": {name: ttft[name] / prefill_s for name in ("median", "p99")},
        "tpot_s": tpot,
        "bare_step_s": spread(bare),
        "tpot_of_bare": spread([one.tpot_s / step_s for one, step_s in zip(samples, bare, strict=True)]),
        "phases": {name: spread([getattr(one.phases, name) for one in samples]) for name in names},
        "before_client_s": spread([one.ttft_s - one.phases.ttft_s for one in samples]),
        "handed_off_gb_s": spread(pushed),
        "loaded_gb_s": spread([gb / one.phases.prefix_load_s for one, gb in zip(samples, loaded, strict=True) if gb] or [0.0]),
        "num_bytes_pushed": spread([one.phases.num_bytes_pushed for one in samples]),
        "num_cached_tokens": spread([one.usage.num_cached_tokens for one in samples]),
        "num_preemptions": sum(one.phases.num_preemptions for one in samples),
        "num_attempts": sum(one.phases.num_attempts for one in samples),
        "transports": sorted({one.phases.transport for one in samples}),
    }


def compared(expected: Sequence[Sequence[int]], leads: Sequence[Sequence[float]], found: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Each answer beside the engine's: equal, or where they part and by how much the engine's likeliest logit led the next there.

    leads: [answer][i], of the token at output index i + 1.
    """
    rows: list[dict[str, Any]] = []
    for ours, lead, theirs in zip(expected, leads, found, strict=True):
        parted = next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        row: dict[str, Any] = {"equal": parted is None}
        if parted is not None:
            row |= {"at": parted, "lead": lead[parted - 1] if parted else None}
        rows.append(row)
    return rows


def show_figures(name: str, found: dict[str, Any], prefill_s: float) -> None:
    def ms(values: dict[str, float]) -> str:
        return f"{values['median'] * 1e3:9.3f} ms, p99 {values['p99'] * 1e3:9.3f}"

    measure.show(f"\n{name}, {found['num_requests']} requests")
    over, of_bare = found["ttft_over_bare_s"]["median"] * 1e3, found["ttft_of_bare"]["median"]
    measure.show(f"  TTFT  {ms(found['ttft_s'])}: {of_bare:.3f} of the bare {prefill_s * 1e3:.3f} ms, {over:+.3f} ms")
    ratio = found["tpot_of_bare"]
    bare = found["bare_step_s"]["median"] * 1e3
    measure.show(f"  TPOT  {ms(found['tpot_s'])}: {ratio['median']:.3f} of the bare {bare:.3f} ms (p99 {ratio['p99']:.3f})")
    for phase, values in found["phases"].items():
        measure.show(f"    {phase:18s} {ms(values)}")
    cached, mb = found["num_cached_tokens"]["median"], found["num_bytes_pushed"]["median"] / 1e6
    rates = f"handed off {found['handed_off_gb_s']['median']:.2f} GB/s, prefix loaded {found['loaded_gb_s']['median']:.2f} GB/s"
    measure.show(f"  KV    {mb:.1f} MB pushed, {cached:g} tokens cached; {rates}; {', '.join(found['transports'])}")


def show_tokens(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        parted = "" if row["equal"] else f"  DIFFERENT from output token {row['at']} on, where the likeliest logit led by {row['lead']}"
        measure.show(f"tokens of request {number}: {'equal to the engine alone' if row['equal'] else ''}{parted}")


# the run


def configure(arguments: argparse.Namespace, folder: Path) -> tuple[ClusterConfig, int]:
    """And the bytes of a token's KV. Raises SystemExit where shared memory has no room for a few requests."""
    each = arguments.prompt_tokens + arguments.output_tokens
    made_for = SHAPES[arguments.shape]["max_position_embeddings"]
    options = ModelOptions(
        path=str(folder), device=arguments.device, load_format="dummy", max_model_len=min(-(-each // 1024) * 1024 + 1024, made_for)
    )
    schema = kv_schema(ModelConfig.from_folder(folder), options)
    request_bytes = -(-each // schema.block_size) * schema.block_bytes
    free_bytes = shutil.disk_usage(FOLDER).free
    num_stored = min(STORED_REQUESTS, int(0.75 * free_bytes) // request_bytes)
    measure.show(f"KV of a request {request_bytes / 1e6:.1f} MB; {FOLDER} has {free_bytes / 1e9:.1f} GB free and takes {num_stored}")
    if num_stored < 3:
        raise SystemExit(f"{FOLDER} is too small for three requests; enlarge it: mount -o remount,size=… {FOLDER}")
    pages = {"kv_capacity_tokens": PAGED_REQUESTS * -(-each // schema.block_size) * schema.block_size}
    config = ClusterConfig(
        model=options,
        store=StoreConfig(arena_bytes=num_stored * request_bytes),
        prefill=PrefillConfig(max_tokens_per_step=arguments.step_tokens, **pages),
        decode=DecodeConfig(max_running=MAX_RUNNING, **pages),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0),
    )
    return config, schema.block_bytes // schema.block_size


def make_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    rng = random.Random(arguments.seed)
    vocab_size = SHAPES[arguments.shape]["vocab_size"]
    return [[rng.randrange(vocab_size) for _ in range(arguments.prompt_tokens)] for _ in range(NUM_WARM_UP + 2 * arguments.requests)]


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--requests", type=int, default=50, help="of each of the two runs")
    options.add_argument("--prompt-tokens", type=int, default=8192)
    options.add_argument("--output-tokens", type=int, default=128, help="at least 2")
    options.add_argument("--step-tokens", type=int, default=PrefillConfig().max_tokens_per_step, help="of a prefill step")
    options.add_argument("--rate", type=float, help=f"requests a second; without it {STEADY_SHARE:g} of what the bare prefill takes")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", help="JSON file to write")
    arguments = options.parse_args()
    if arguments.requests < 1 or arguments.output_tokens < 2:
        options.error("at least one request and two tokens of output are needed")
    return arguments


def staged(name: str, run: Callable[[], Any]) -> Any:
    measure.show(name)
    began = time.monotonic()
    found = run()
    measure.show(f"{name}: {time.monotonic() - began:.1f} s")
    return found


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda":
        measure.require_gpu("this benchmark, but for --device cpu,")
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(arguments.shape, Path(folder) / arguments.shape)
        write_tokenizer(arguments.shape, model)
        config, kv_bytes = configure(arguments, model)
        prompts = make_prompts(arguments)
        alone = staged("one engine alone", lambda: run_alone(config, prompts[NUM_WARM_UP:], arguments.output_tokens))
        steps = ", ".join(f"{num_seqs}: {seconds * 1e3:.3f}" for num_seqs, seconds in alone["step_s"].items())
        measure.show(f"bare prefill {alone['prefill_s'] * 1e3:.3f} ms, ms a step by batch {steps}")
        rate = arguments.rate or STEADY_SHARE / alone["prefill_s"]
        found = staged("the cluster", lambda: asyncio.run(run_cluster(config, prompts, arguments, rate)))
    samples: dict[str, list[Sample]] = found["samples"]
    runs = {name: figures(those, alone, kv_bytes) for name, those in samples.items()}
    for name, those in runs.items():
        show_figures(name, those, alone["prefill_s"])
    num_compared = len(alone["tokens"])
    tokens = compared(alone["tokens"], alone["leads"], [one.token_ids for one in samples["one at a time"][:num_compared]])
    show_tokens(tokens)
    if arguments.out:
        rows = {
            "environment": measure.environment()
            | {"num_gpus": torch.cuda.device_count()}
            | {name: version(name) for name in ("ray", "grpcio", "protobuf")},
            "arguments": vars(arguments),
            "config": dataclasses.asdict(config),
            "rate": rate,
            "alone": {key: value for key, value in alone.items() if key not in ("tokens", "leads")},
            "started_s": found["started_s"],
            "runs": runs,
            "tokens": tokens,
            "again_equal": sum(
                first.token_ids == second.token_ids
                for first, second in zip(samples["one at a time"][-NUM_AGAIN:], samples["again"], strict=True)
            ),
        }
        Path(arguments.out).write_text(json.dumps(rows, indent=1))
    if not all(row["equal"] for row in tokens):
        raise SystemExit("the cluster's greedy tokens are not those of the engine alone")


if __name__ == "__main__":
    main()
