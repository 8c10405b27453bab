"""Steps of one engine, Llama-3.1-8B's shape with random weights in bf16: decode tokens, chunks, and both in one step, beside their floor.

    halfmoon bench steps [--out FILE] [--profile] [--quick]

Pages lie in random order, as after hours. Of each step: milliseconds alone, from the call to the end on the device; those of the host,
until the launch has returned; milliseconds a step where each is launched before the last one's tokens are read, as a worker runs them;
and the way without graphs, which every mixed step took once: each kernel launched by itself, all rows through the prefill kernel.

Floor: the step's matrix products as they run here alone, in a graph, plus keys and values of the decode tokens at the rate of a large
copy, plus the chunks' attention at the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch

import engine as alone
from halfmoon.engine.engine import Engine
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_graphs import sampled_chunks

MAX_MODEL_LEN = 66560
MAX_DECODES = 256
NUM_TOKENS = 400_000  # of KV
NUM_STEPS = 12


class Step(NamedTuple):
    """chunk: tokens, and the KV before them; decodes: contexts."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]

    @property
    def name(self) -> str:
        parts = [f"{size:,} over {before:,}" for size, before in self.chunks]
        counts = {length: self.decodes.count(length) for length in dict.fromkeys(self.decodes)}
        return " + ".join([*parts, *(f"{count} x {length:,}" for length, count in counts.items())])

    @property
    def num_rows(self) -> int:
        return sum(size for size, _ in self.chunks) + len(self.decodes)


USUAL, LONG = (10_000,) * 16, (60_000,)
STEPS = (
    Step((), USUAL),
    Step(((512, 8192),), ()),
    Step(((2048, 8192),), ()),
    Step(((512, 8192),), USUAL[:1]),
    Step(((512, 8192),), USUAL),
    Step(((512, 8192),), (*USUAL, *LONG)),
    Step(((2048, 8192),), USUAL),
    Step(((2048, 8192),), (*USUAL, *LONG)),
    Step(((64, 8192),), USUAL),
    Step(((256, 8192),), USUAL),
    Step(((128, 32768),), ()),
    Step(((200, 0), (150, 0), (90, 0)), USUAL),
    Step(((496, 8192),), USUAL),
    Step(((1000, 0),), ()),
    Step(((100, 0),), ()),
    Step(((4096, 8192),), USUAL),
)
QUICK = (0, 1, 2, 5, 7)


def sequences_of(engine: Engine, step: Step) -> list[StepChunk]:
    """Chunks first, as a scheduler may well have it."""
    pages = torch.randperm(engine.cache.num_pages).tolist()
    found = []
    for size, before in step.chunks:
        one = _sequence(engine, before + size, pages, 0)
        found.append(StepChunk(one, before, size))
    for length in step.decodes:
        one = _sequence(engine, length, pages, 2 * NUM_STEPS)
        found.append(StepChunk(one, length - 1, 1))
    return found


def _sequence(engine: Engine, num_tokens: int, pages: list[int], extra: int) -> Sequence:
    (one,) = alone.sequences(engine, 1, num_tokens, 0)
    one.pages = [pages.pop() for _ in range(-(-(num_tokens + extra) // engine.page_size))]
    return one


def alone_ms(run: Callable[[], object]) -> tuple[float, float]:
    """Medians: until the device is done, and until the call has returned."""
    totals, hosts = [], []
    for _ in range(NUM_STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        totals.append((time.perf_counter() - began) * 1e3)
        hosts.append((returned - began) * 1e3)
    return statistics.median(totals), statistics.median(hosts)


def ahead_ms(engine: Engine, chunks: list[StepChunk]) -> float:
    """A step, launched behind another and read after the one behind it was launched; decode tokens come from the step before."""
    pending: Any = None
    times, began = [], 0.0
    for number in range(NUM_STEPS + 2):
        on_its_way = [] if pending is None else [chunk.sequence for chunk in sampled_chunks(pending[1])]
        step = [
            StepChunk(one, one.num_tokens - 1 + (one in on_its_way), 1) if size == 1 else StepChunk(one, start, size)
            for one, start, size in chunks
        ]
        launched = engine.launch(step)
        assert launched is not None, "no graph holds the step"
        if pending is not None:
            tokens = pending[0].tokens()
            for chunk, token in zip(sampled_chunks(pending[1]), tokens, strict=True):
                if chunk.num_tokens == 1:
                    chunk.sequence.token_ids.append(token)
            now = time.perf_counter()
            if number > 2:
                times.append((now - began) * 1e3)
            began = now
        pending = (launched, step)
    torch.cuda.synchronize()
    return statistics.median(times)


def products_ms(engine: Engine, num_rows: int) -> float:
    """The layers' matrix products over so many rows, as a graph."""
    weights = engine._decoder.weights
    linears = [linear.weight for layer in weights.layers for linear in layer.linears().values()]
    inputs = {width: torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16) for width in {weight.shape[1] for weight in linears}}

    def run() -> None:
        for weight in linears:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    replay = measure.captured(run)
    replay()
    return alone_ms(replay)[0]


def floor_ms(engine: Engine, step: Step, limits: dict[str, float]) -> dict[str, float]:
    config = engine.config
    kv_bytes = sum(step.decodes) * engine.schema.block_bytes / engine.page_size
    pairs = sum(size * (before + size / 2) for size, before in step.chunks)
    flops = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    return {
        "products": products_ms(engine, step.num_rows),
        "decode_kv": kv_bytes / limits["copy_gb_s"] / 1e6,
        "chunk_attention": flops / limits["matmul_tflops"] / 1e9,
    }


def measure_step(engine: Engine, step: Step, limits: dict[str, float]) -> dict[str, Any]:
    chunks = sequences_of(engine, step)
    graphs = engine._graphs
    alone_total, host = alone_ms(lambda: engine.launch(chunks))
    behind = ahead_ms(engine, chunks)
    engine._graphs = None
    plain = [StepChunk(one, one.num_tokens - 1, 1) if size == 1 else StepChunk(one, start, size) for one, start, size in chunks]
    engine.forward(plain)
    before, before_host = alone_ms(lambda: engine.forward(plain))
    engine._graphs = graphs
    parts = floor_ms(engine, step, limits)
    floor = sum(parts.values())
    measure.show(
        f"{step.name:40s} {alone_total:7.2f} alone  {host:5.2f} host  {behind:7.2f} behind another  floor {floor:6.2f}"
        f" ({', '.join(f'{value:.1f}' for value in parts.values())})  {floor / behind:.2f}"
        f"  without graphs {before:7.2f}, host {before_host:5.2f}"
    )
    return {
        "case": step.name, "ms": alone_total, "host_ms": host, "behind_ms": behind, "floor_ms": floor, "floor_parts_ms": parts,
        "of_floor": floor / behind, "without_graphs_ms": before, "without_graphs_host_ms": before_host,
    }  # fmt: skip


def profile(engine: Engine, step: Step) -> None:
    chunks = sequences_of(engine, step)
    engine.launch(chunks)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        engine.launch(chunks)
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda item: -item.device_time_total)
    measure.show(f"profile {step.name}: {sum(item.device_time_total for item in kernels) / 1e3:.2f} ms of kernels")
    for item in kernels[:14]:
        measure.show(f"  {item.device_time_total:9.1f} us {item.count:5d} x  {item.key[:90]}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    options.add_argument("--profile", action="store_true", help="GPU time by kernel of two mixed steps")
    options.add_argument("--quick", action="store_true", help="fewer steps")
    args = options.parse_args()
    measure.require_gpu("this benchmark")
    limits = measure.ceilings()
    measure.show(f"{torch.cuda.get_device_name()}: {limits['matmul_tflops']:.0f} TFLOP/s, {limits['copy_gb_s']:.0f} GB/s")
    began = time.perf_counter()
    engine = alone.load("llama-3.1-8b", "cuda", NUM_TOKENS, MAX_DECODES, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    measure.show(f"loaded in {time.perf_counter() - began:.1f} s, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB left")
    rows: list[dict[str, Any]] = [{"limits": limits}]
    for number, step in enumerate(STEPS):
        if not args.quick or number in QUICK:
            rows.append(measure_step(engine, step, limits))
    if args.profile:
        profile(engine, STEPS[5])
        profile(engine, STEPS[1])
    measure.write(args.out, rows)


if __name__ == "__main__":
    main()
