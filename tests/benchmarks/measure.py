"""What every kernel benchmark shares: cases and how they are run, interleaved timing on one GPU, what it ran on, and the JSON it leaves.

A benchmark file has cases(quick) and, where a row is not checked as it is timed, check(seed); Case.run gives a row:
    {"kernel", "case", "ms": {implementation: ms}, "flops", "bytes", "tflops": {...}, "gb_s": {...}, "error"...}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]
absent: dict[str, str] = {}  # peer: why it is not beside ours


class Case(NamedTuple):
    kernel: str
    name: str
    run: Callable[[], Row]


def require_gpu(what: str) -> None:
    """Raises SystemExit with one line where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"{what} needs a CUDA GPU, and torch {torch.__version__} finds none; correctness is tested without one: pytest tests/kernels"
        )


def run_cases(cases: Iterable[Case], rows: list[Row], limit_s: float = float("inf"), save: Callable[[], None] = lambda: None) -> list[str]:
    """Adds each case's row; the names of those that were not begun because limit_s seconds were over."""
    began, left_out = time.monotonic(), []
    for case in cases:
        if time.monotonic() - began > limit_s:
            left_out.append(f"{case.kernel}: {case.name}")
            continue
        rows.append(case.run())
        torch.cuda.empty_cache()
        save()
    if left_out:
        show(f"left out after {limit_s:.0f} s: {'; '.join(left_out)}")
    return left_out


def main(description: str | None, cases: Callable[[bool], list[Case]], check: Callable[[int], list[Row]] | None = None) -> None:
    """A benchmark file's own command line."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="compare with fp32 on random inputs before timing")
    options.add_argument("--quick", action="store_true", help="fewer cases")
    options.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options.add_argument("--out", help="JSON file to write")
    args = options.parse_args()
    require_gpu("this benchmark")
    torch.manual_seed(args.seed)
    rows = check(args.seed) if check is not None and args.check else []
    if all_right(rows):
        run_cases(cases(args.quick), rows)
    write(args.out, rows)
    if not all_right(rows):
        raise SystemExit("wrong results; nothing was timed")


def all_right(rows: list[Row]) -> bool:
    return all(row.get("ok", True) for row in rows)


def checked(name: str, errors: dict[str, float], limit: float, **more: Any) -> Row:
    """The row of a comparison with fp32, shown; ok where every error is at most the limit."""
    bad = [key for key, error in errors.items() if not error <= limit]
    show(
        f"check {name:44s} " + " ".join(f"{k}={e:.1e}" for k, e in errors.items()) + (f"  WRONG (above {limit:.1e}): {bad}" if bad else "")
    )
    return {"check": name, "errors": errors, "limit": limit, "ok": not bad, **more}


def interleaved(candidates: Calls, *, rounds: int = 3, warmup_ms: int = 10, measure_ms: int = 40) -> dict[str, float]:
    """Milliseconds of each: the median over rounds of medians, the candidates in turn, since the power limit moves with what ran before.
    Every run starts with a cold L2 cache."""
    from triton.testing import do_bench

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


def present(calls: Calls) -> Calls:
    """Those peers that run here: each is called once. What stops another is said, and noted in `absent`."""
    found: Calls = {}
    for name, call in calls.items():
        try:
            call()
            torch.cuda.synchronize()
        except (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError) as error:  # foreign code, of any version
            note_absent(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}")
        else:
            found[name] = call
    return found


def note_absent(peer: str, why: str) -> None:
    if peer not in absent:
        show(f"peer {peer} is absent: {why}")
    absent.setdefault(peer, why)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in fp32; infinite where out is not a number."""
    out, reference = out.float(), reference.float()
    return float((out - reference).norm() / reference.norm()) if bool(torch.isfinite(out).all()) else float("inf")


def random_pages(
    num_seqs: int, kv_len: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V [2, num_pages, num_kv_heads, page_size, head_dim] and a block table of shuffled pages [num_seqs, pages a sequence]."""
    each = -(-kv_len // page_size)
    pages = torch.empty(2, num_seqs * each, num_kv_heads, page_size, head_dim, device="cuda", dtype=dtype)
    for side in pages:
        side.copy_(torch.randn(side.shape, device="cuda", dtype=torch.float32))
    return pages, torch.randperm(num_seqs * each, device="cuda", dtype=torch.int32).view(num_seqs, each)


def load_fa3() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3's forward over pages [num_pages, page_size, num_kv_heads, head_dim], from the library that FA3_SO names (vLLM's
    build, _vllm_fa3_C.abi3.so). descale: fp32 [num_seqs, num_kv_heads], of q, k and v alike, for fp8."""
    path = os.environ.get("FA3_SO")
    if not path:
        note_absent("fa3", "FA3_SO names no library")
        return None
    torch.ops.load_library(path)
    forward = torch.ops._vllm_fa3_C.fwd

    def fa3(q, k, v, *, cu_q=None, used=None, max_q=None, max_k=None, table=None, causal=True, descale=None):
        return forward(
            q, k, v, None, None, None, None, cu_q, None, None, None, used, max_q, max_k, table,
            None, None, None, None, None, descale, descale, descale,
            q.shape[-1] ** -0.5, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip

    return fa3


def load_vllm() -> Any | None:
    """vLLM's operators over rows, torch.ops._C, where vLLM can be imported."""
    try:
        import vllm._custom_ops  # pyright: ignore[reportMissingImports]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        note_absent("vllm", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return None
    return torch.ops._C


def ceilings() -> dict[str, float]:
    """What this GPU reaches, now: a bf16 matrix product of 8192 x 8192 x 8192, and a copy of 2 GB, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    ms = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, measure_ms=100)
    return {"matmul_tflops": 2 * 8192**3 / ms["matmul"] / 1e9, "copy_gb_s": 2 * source.nbytes / ms["copy"] / 1e6}


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "sms": torch.cuda.get_device_properties(0).multi_processor_count if gpu else 0,
        "torch": torch.__version__,
        "triton": version,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "python": platform.python_version(),
        "commit": os.environ.get("HALFMOON_COMMIT") or commit or "unknown",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "absent": absent,
    }


def write(path: str | None, rows: list[Row]) -> None:
    if path:
        Path(path).write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


def timed(kernel: str, case: str, flops: float, num_bytes: float, times: dict[str, float], *, compute: bool, **more: Any) -> Row:
    """The row of a case, shown: TFLOP/s where it is bound by computing, else GB/s. flops and num_bytes are what must be done, once."""
    tflops = {name: flops / ms / 1e9 for name, ms in times.items()}
    gb_s = {name: num_bytes / ms / 1e6 for name, ms in times.items()}
    rates = (f"{k} {tflops[k]:.1f} TFLOP/s" if compute else f"{k} {gb_s[k]:.0f} GB/s ({ms * 1e3:.1f} us)" for k, ms in times.items())
    extra = "".join(f"  {k} {value:.1e}" for k, value in more.items() if isinstance(value, float))
    show(f"{kernel + ': ' + case:46s} " + "  ".join(rates) + extra)
    return {"kernel": kernel, "case": case, "ms": times, "flops": flops, "bytes": num_bytes, "tflops": tflops, "gb_s": gb_s, **more}


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
