"""What every kernel benchmark shares: interleaved timing on one GPU, what it ran on, and the JSON it leaves."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

ROOT = Path(__file__).resolve().parents[2]


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int = 3, warmup_ms: int = 10, measure_ms: int = 40
) -> dict[str, float]:
    """Milliseconds of each: the median over rounds of medians, the candidates in turn, since the power limit moves with what ran before.
    Every run starts with a cold L2 cache."""
    seen: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seen[name].append(float(do_bench(run, warmup=warmup_ms, rep=measure_ms, return_mode="median")))
    return {name: statistics.median(values) for name, values in seen.items()}


def captured(*calls: Callable[[], object]) -> Callable[[], None]:
    """The calls, one after another, as a CUDA graph, so that launches cost what they cost in decoding."""

    def run() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_held: object = calls) -> None:  # the graph knows addresses only: the tensors must outlive it
        graph.replay()

    return replay


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in fp32; infinite where out is not a number."""
    difference = (out.float() - reference.float()).norm() / reference.float().norm()
    return float(difference) if bool(torch.isfinite(out).all()) else float("inf")


def random_pages(
    num_seqs: int, kv_len: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V [2, num_pages, num_kv_heads, page_size, head_dim] and a block table of shuffled pages [num_seqs, pages a sequence]."""
    each = triton.cdiv(kv_len, page_size)
    pages = torch.randn(2, num_seqs * each, num_kv_heads, page_size, head_dim, device="cuda", dtype=torch.float32).to(dtype)
    return pages, torch.randperm(num_seqs * each, device="cuda", dtype=torch.int32).view(num_seqs, each)


def load_fa3() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3's forward over pages [num_pages, page_size, num_kv_heads, head_dim], from the library that FA3_SO names (vLLM's
    build, _vllm_fa3_C.abi3.so)."""
    path = os.environ.get("FA3_SO")
    if not path:
        return None
    torch.ops.load_library(path)
    forward = torch.ops._vllm_fa3_C.fwd

    def fa3(q, k, v, *, cu_q=None, used=None, max_q=None, max_k=None, table=None, causal=True):
        return forward(
            q, k, v, None, None, None, None, cu_q, None, None, None, used, max_q, max_k, table,
            None, None, None, None, None, None, None, None,
            q.shape[-1] ** -0.5, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip

    return fa3


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": commit or os.environ.get("HALFMOON_COMMIT", "unknown"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write(path: str | None, rows: list[dict[str, Any]]) -> None:
    if path:
        Path(path).write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


def moved(name: str, num_bytes: float, times: dict[str, float], **more: float) -> dict[str, Any]:
    """The row of a kernel that is bound by memory, shown and returned."""
    line = "  ".join(f"{k} {num_bytes / ms / 1e6:6.0f} GB/s ({ms * 1e3:.1f} us)" for k, ms in times.items())
    show(f"{name:30s} {line}" + "".join(f"  {k} {value:.1e}" for k, value in more.items()))
    return {"case": name, "ms": times, "gb_s": {k: num_bytes / ms / 1e6 for k, ms in times.items()}, **more}


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
