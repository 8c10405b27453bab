"""The engine alone, Llama-3.1-8B's shape with random weights in bf16: prefill tokens/s and decode ms a step, beside vLLM.

    halfmoon bench engine [--out FILE] [--peer] [--profile]

Logits are checked against the same weights in fp32 on the CPU first (a small shape); nothing is timed where they are wrong.
Floors: the floating-point operations of a prefill at the rate that a large matrix product reaches here, the bytes of a decode step at the
rate of a large copy. Wall time, with everything that the host does; a step ends when its tokens are on the host. Decode is timed as a
worker runs it, the next step launched before this one's tokens are read, and in turn: a step is begun when the one before is read.
--peer runs vLLM first, in a process of its own, where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from shapes import write_shape

from halfmoon.engine.engine import Engine
from halfmoon.engine.model_flops import ModelFlops
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.step_graphs import InFlight
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.sampling import SamplingParams

PREFILL = ((16, 1024), (8, 8192), (2, 32768))
DECODE = ((1, 2048), (32, 2048), (128, 2048), (64, 8192))
SHAPE = "llama-3.1-8b"
MAX_MODEL_LEN = 36864
MAX_STEP_TOKENS = 8192
NUM_STEPS = 64


def sequences(engine: Engine, num_seqs: int, num_tokens: int, extra: int, **sampling: Any) -> list[Sequence]:
    """Random prompts, with pages for `extra` tokens more, in random order."""
    each = -(-(num_tokens + extra) // engine.page_size)
    pages = torch.randperm(engine.cache.num_pages)[: num_seqs * each].view(num_seqs, each).tolist()
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 10**6, **sampling})
    vocab_size = engine.config.vocab_size
    return [
        Sequence(f"r{row}", [random.randrange(vocab_size) for _ in range(num_tokens)], num_tokens, params, pages=pages[row])
        for row in range(num_seqs)
    ]


def prefill(engine: Engine, batch: list[Sequence]) -> None:
    """In steps of MAX_STEP_TOKENS, as a scheduler would: whole prompts together, or a long one in chunks."""
    for sequence in batch:
        sequence.num_computed_tokens = 0
    waiting = list(batch)
    while waiting:
        room, chunks = MAX_STEP_TOKENS, []
        for sequence in waiting:
            start = sequence.num_computed_tokens
            count = min(room, sequence.num_tokens - start)
            if count == 0:
                break
            chunks.append(StepChunk(sequence, start, count))
            sequence.num_computed_tokens += count
            room -= count
        logits = engine.forward(chunks)
        done = [chunk.sequence for chunk in chunks if chunk.is_last]
        if done:
            engine.sample(logits, done)
        waiting = [sequence for sequence in waiting if sequence.num_computed_tokens < sequence.num_tokens]
    torch.cuda.synchronize()


def launch(engine: Engine, batch: list[Sequence], num_ahead: int) -> InFlight:
    """A step of one token each. num_ahead: tokens of each that the step before has not given yet."""
    launched = engine.launch([StepChunk(sequence, sequence.num_tokens - 1 + num_ahead, 1) for sequence in batch])
    assert launched is not None, "no graph holds the batch"
    return launched


def decode_steps(engine: Engine, batch: list[Sequence], num_steps: int) -> list[float]:
    """Milliseconds between the tokens of one step and of the next, each launched while the one before runs."""
    times: list[float] = []
    current = launch(engine, batch, 0)
    began = time.perf_counter()
    for _ in range(num_steps):
        ahead = launch(engine, batch, 1)
        for sequence, token in zip(batch, current.tokens(), strict=True):
            sequence.token_ids.append(token)
        ended = time.perf_counter()
        times.append((ended - began) * 1e3)
        began, current = ended, ahead
    for sequence, token in zip(batch, current.tokens(), strict=True):
        sequence.token_ids.append(token)
    return times


def decode_step(engine: Engine, batch: list[Sequence]) -> None:
    logits = engine.forward([StepChunk(sequence, sequence.num_tokens - 1, 1) for sequence in batch])
    for sequence, token in zip(batch, engine.sample(logits, batch), strict=True):
        sequence.token_ids.append(token.token_id)


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def load(shape: str, device: str, num_tokens: int, max_decode_batch: int, **options: Any) -> Engine:
    folder = write_shape(shape, Path(tempfile.mkdtemp()))
    seen: dict[str, float] = {}

    def progress(what: str, done: int, count: int) -> None:
        seen.setdefault(what, time.perf_counter())
        if done == count:
            measure.show(f"  {shape} on {device}: {what}, {time.perf_counter() - seen[what]:.1f} s")

    chosen = ModelOptions(path=str(folder), device=device, load_format="dummy", **options)  # type: ignore[arg-type]
    return Engine.load(chosen, kv_capacity_tokens=num_tokens, num_threads=8, max_decode_batch=max_decode_batch, progress=progress)


def check() -> list[dict[str, Any]]:
    """A small model's logits, prefill in chunks and decode as graphs, against fp32 on the CPU with the same weights."""
    ours = load("small", "cuda", 16384, 16, block_size=64)
    exact = load("small", "cpu", 16384, 0, block_size=64, dtype="float32")
    copy_weights(ours, exact)
    rows = []
    for num_seqs, prompt_len in ((1, 700), (5, 300), (16, 130)):
        worst = 0.0
        here, there = (sequences(engine, num_seqs, prompt_len, 16) for engine in (ours, exact))
        for mine, other in zip(here, there, strict=True):
            other.token_ids[:] = mine.token_ids
        for start, count in ((0, 96), (96, prompt_len - 96), *((prompt_len + step, 1) for step in range(6))):
            logits = [engine.forward([StepChunk(one, start, count) for one in batch]) for engine, batch in ((ours, here), (exact, there))]
            if len(logits[0]):
                worst = max(worst, measure.relative_error(logits[0].cpu(), logits[1]))
                for mine, other, token in zip(here, there, logits[1].argmax(dim=-1).tolist(), strict=True):
                    mine.token_ids.append(token)
                    other.token_ids.append(token)
        rows.append({"check": f"logits {num_seqs} x {prompt_len}", "error": worst, "ok": worst < 2e-2})
        measure.show(f"check {rows[-1]['check']:20s} {worst:.1e}" + ("" if rows[-1]["ok"] else "  WRONG"))
    return rows


def copy_weights(source: Engine, target: Engine) -> None:
    for tensor, other in zip(source._decoder.weights.tensors(), target._decoder.weights.tensors(), strict=True):
        other.copy_(tensor)


def prefill_tflop(engine: Engine, num_seqs: int, num_tokens: int) -> float:
    """Matrix products of all layers, causal attention, and the head for one token a sequence."""
    config, weights = engine.config, engine._decoder.weights
    per_token = ModelFlops.of_model(config).per_token
    attention = 2 * num_tokens * num_tokens * config.num_heads * config.head_dim * config.num_layers
    return num_seqs * (per_token * num_tokens + 2 * weights.lm_head.numel() + attention) / 1e12


def decode_gb(engine: Engine, num_seqs: int, kv_len: float) -> float:
    weights = engine._decoder.weights
    in_layers = sum(tensor.nbytes for layer in weights.layers for tensor in layer.tensors())
    kv_bytes = engine.schema.block_bytes / engine.page_size
    return (in_layers + weights.lm_head.nbytes + num_seqs * kv_len * kv_bytes) / 1e9


def measure_prefill(engine: Engine, limits: dict[str, float], rows: list[dict[str, Any]]) -> None:
    for num_seqs, num_tokens in PREFILL:
        batch = sequences(engine, num_seqs, num_tokens, 1)
        prefill(engine, batch)
        times = [seconds(lambda batch=batch: prefill(engine, batch)) for _ in range(3)]
        taken, tflop = statistics.median(times), prefill_tflop(engine, num_seqs, num_tokens)
        floor = tflop / limits["matmul_tflops"]
        rows.append(
            {
                "case": f"prefill {num_seqs} x {num_tokens}",
                "s": taken,
                "all_s": times,
                "tokens_s": num_seqs * num_tokens / taken,
                "floor_s": floor,
                "of_floor": floor / taken,
                "tflops": tflop / taken,
            }
        )
        rate = f"{num_seqs * num_tokens / taken:8.0f} tok/s  {tflop / taken:4.0f} TFLOP/s"
        measure.show(f"prefill {num_seqs:3d} x {num_tokens:5d}  {rate}  {floor / taken:.3f} of the floor")


def measure_decode(engine: Engine, limits: dict[str, float], rows: list[dict[str, Any]], label: str = "decode", **sampling: Any) -> None:
    for num_seqs, kv_len in DECODE:
        batch = sequences(engine, num_seqs, kv_len, NUM_STEPS + 16, **sampling)
        in_turn = statistics.fmean(in_turn_ms(engine, batch))
        tokens = [sequence.token_ids.copy() for sequence in batch]
        for sequence in batch:
            del sequence.token_ids[kv_len:]
        times = decode_steps(engine, batch, NUM_STEPS + 8)[8:]
        same = all(sequence.token_ids[: len(known)] == known for sequence, known in zip(batch, tokens, strict=True))
        taken = statistics.fmean(times)  # steps run one after another, so the mean is what a stream sees
        floor = decode_gb(engine, num_seqs, kv_len + 8 + NUM_STEPS / 2) / limits["copy_gb_s"] * 1e3
        row = {"case": f"{label} {num_seqs} x {kv_len}", "ms": taken, "median_ms": statistics.median(times), "floor_ms": floor}
        rows.append({**row, "ok": same, "of_floor": floor / taken, "tokens_s": num_seqs / taken * 1e3, "in_turn_ms": in_turn})
        step = f"{taken:7.3f} ms/step (median {statistics.median(times):.3f}, in turn {in_turn:.3f})"
        measure.show(
            f"{label} {num_seqs:3d} x {kv_len:5d}  {step}  floor {floor:.3f}  {floor / taken:.3f}" + ("" if same else "  OTHER TOKENS")
        )


def in_turn_ms(engine: Engine, batch: list[Sequence]) -> list[float]:
    for _ in range(8):
        decode_step(engine, batch)
    return [seconds(lambda: decode_step(engine, batch)) * 1e3 for _ in range(NUM_STEPS)]


def profile(engine: Engine) -> list[dict[str, Any]]:
    """GPU microseconds a decode step by kernel, of graphs launched one ahead of the other."""
    rows = []
    for num_seqs, kv_len in DECODE:
        batch = sequences(engine, num_seqs, kv_len, 64)
        decode_steps(engine, batch, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            decode_steps(engine, batch, 3)  # and the one ahead of them
        kernels = sorted(seen.key_averages(), key=lambda item: -item.device_time_total)
        total = sum(item.device_time_total for item in kernels) / 4
        measure.show(f"profile {num_seqs} x {kv_len}: {total / 1e3:.3f} ms of kernels a step")
        for item in kernels[:12]:
            rows.append(
                {"profile": f"{num_seqs} x {kv_len}", "kernel": item.key[:90], "us": item.device_time_total / 4, "calls": item.count / 4}
            )
            measure.show(f"  {item.device_time_total / 4:9.1f} us {item.count / 4:6.1f} x  {item.key[:90]}")
    return rows


def run_peer() -> dict[str, Any] | None:
    """In a process of its own, so that all of its memory is back before ours is measured."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        shape = write_shape(SHAPE, Path(folder) / "model")
        cases = {"prefill": PREFILL, "decode": DECODE, "max_model_len": MAX_MODEL_LEN, "max_step_tokens": MAX_STEP_TOKENS}
        command = [sys.executable, "-P", str(Path(__file__).with_name("vllm_peer.py")), str(shape), json.dumps(cases), str(rows)]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        if found.returncode:
            measure.show("vLLM did not run: " + (found.stdout + found.stderr)[-12000:])
            return None
        return json.loads(rows.read_text())


def show_peer(rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    ours = {row["case"]: row for row in rows if "case" in row}
    for row in found["rows"]:
        mine = ours[row["case"]]
        mine.update(vllm=row, vllm_version=found["version"])
        ratio = mine["tokens_s"] / row["tokens_s"] if "s" in row else row["ms"] / mine["ms"]
        what = f"{row['tokens_s']:.0f} tok/s" if "s" in row else f"{row['ms']:.3f} ms/step"
        measure.show(f"vLLM {found['version']} {row['case']:18s} {what}; ours is {ratio:.3f} as fast")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", help="JSON file to write")
    options.add_argument("--peer", action="store_true", help="vLLM, too")
    options.add_argument("--profile", action="store_true", help="kernels of a decode step, too")
    options.add_argument("--sampled", action="store_true", help="decode with top-k and top-p, too")
    args = options.parse_args()
    rows = check()
    if not all(row["ok"] for row in rows):
        measure.write(args.out, rows)
        raise SystemExit("wrong results; nothing was timed")
    found = run_peer() if args.peer else None
    limits = measure.ceilings()
    rows.append(limits)
    measure.show(f"floors: matmul {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_gb_s']:.0f} GB/s")
    engine = load(SHAPE, "cuda", 64 * 8192 + 64 * 256, 128, max_model_len=MAX_MODEL_LEN)
    engine.cache.data.normal_()
    measure_prefill(engine, limits, rows)
    measure_decode(engine, limits, rows)
    if args.sampled:
        measure_decode(engine, limits, rows, "sampled", temperature=0.8, top_k=50, top_p=0.95, seed=7)
    if args.profile:
        rows += profile(engine)
    if found is not None:
        show_peer(rows, found)
    measure.write(args.out, rows)
    if not measure.all_right(rows):
        raise SystemExit("steps launched ahead gave other tokens than steps in turn")


if __name__ == "__main__":
    main()
