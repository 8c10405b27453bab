"""Every kernel: first all of them against fp32, then their times beside SDPA (cuDNN, FA2), FlashAttention-3 and vLLM where they are.

    halfmoon bench kernels [--quick] [--limit SECONDS] [--out FILE] [--png FILE]
    halfmoon bench kernels --draw FILE --png FILE      the roofline of a JSON that was written elsewhere; needs no GPU

FA3_SO=<library> adds FlashAttention-3, an importable vllm its operators; what is absent is said. --quick: fewer shapes, and no case is
begun after 6 minutes, so that all ends within 8. The JSON is written after every case. Needs torch and Triton, and for the picture
matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import measure
import roofline
import torch

QUICK_LIMIT_S = 360.0


def own_rows(quick: bool, seed: int, limit_s: float, out: str | None, limits: dict[str, float]) -> list[measure.Row]:
    """Checks, then times; nothing is timed where anything is wrong. Raises SystemExit then."""
    import flash_prefill
    import kv_pack
    import kv_write
    import paged_decode
    import rms_norm
    import silu_mul

    began = time.monotonic()
    rows = flash_prefill.check(seed) + paged_decode.check(seed)
    if measure.all_right(rows):
        cases = [case for module in (flash_prefill, paged_decode, kv_write, rms_norm, silu_mul, kv_pack) for case in module.cases(quick)]
        left_s = limit_s - (time.monotonic() - began)
        left_out = measure.run_cases(cases, rows, left_s, lambda: write(out, rows, limits))
        rows += [{"left_out": left_out}] if left_out else []
    write(out, rows, limits)
    if not measure.all_right(rows):
        raise SystemExit(
            "wrong results: " + "; ".join(row.get("check") or f"{row['kernel']} {row['case']}" for row in rows if not row.get("ok", True))
        )
    return rows


def write(path: str | None, rows: list[measure.Row], limits: dict[str, float]) -> None:
    if path:
        document = {"environment": measure.environment(), "ceilings": limits, "rows": rows}
        Path(path).write_text(json.dumps(document, indent=1))


def summary(found: list[roofline.Point]) -> list[str]:
    """A line a case: the share of the roof that each implementation reaches, and ours beside the best of the others."""
    lines = []
    for kernel, case in dict.fromkeys((point.kernel, point.case) for point in found):
        here = {point.implementation: point for point in found if (point.kernel, point.case) == (kernel, case)}
        ours = max((p.tflops for name, p in here.items() if name in ("hopper", "portable")), default=0.0)
        others = {name: p.tflops for name, p in here.items() if name not in ("hopper", "portable")}
        best = max(others, key=lambda name: others[name], default="")
        ratio = f"  {ours / others[best]:.3f} x {best}" if best else ""
        lines.append(f"{kernel + ': ' + case:52s} " + "  ".join(f"{name} {p.share:.2f}" for name, p in here.items()) + ratio)
    return lines


def draw(document: dict[str, Any], png: str) -> None:
    seen = document["environment"]
    title = f"{seen['gpu']}, torch {seen['torch']}, triton {seen['triton']}"
    try:
        roofline.draw(roofline.points(document["rows"], document["ceilings"]), document["ceilings"], title, Path(png))
    except ImportError as error:
        measure.show(f"no picture: {error}; the JSON can be drawn elsewhere: halfmoon bench kernels --draw FILE --png {png}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer shapes, within 8 minutes")
    options.add_argument("--limit", type=float, help="seconds after which no case is begun")
    options.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options.add_argument("--out", help="JSON file to write")
    options.add_argument("--png", help="picture of the roofline to write")
    options.add_argument("--draw", help="JSON file to draw; nothing is measured")
    args = options.parse_args()
    if args.draw:
        draw(json.loads(Path(args.draw).read_text()), args.png or "roofline.png")
        return
    measure.require_gpu("halfmoon bench kernels")
    torch.manual_seed(args.seed)
    limits = measure.ceilings()
    measure.show(f"ceilings: matrix product {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_gb_s']:.0f} GB/s")
    rows = own_rows(args.quick, args.seed, args.limit or (QUICK_LIMIT_S if args.quick else float("inf")), args.out, limits)
    measure.show("\nshare of the roof, and ours beside the best of the others")
    for line in summary(roofline.points(rows, limits)):
        measure.show(line)
    for peer, why in measure.absent.items():
        measure.show(f"absent: {peer} ({why})")
    if args.png:
        draw({"environment": measure.environment(), "ceilings": limits, "rows": rows}, args.png)


if __name__ == "__main__":
    main()
