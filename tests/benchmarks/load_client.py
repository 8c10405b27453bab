"""What the load generator itself costs: streams of known pace from a server without a model, and how far off they are measured.

    halfmoon bench load_client --streams 200 --pace 50 --cores 1

Client and server are pinned to different cores. Measured TPOT should be the pace's, and the client's CPU share well below 1; what the
client says of its own lag is printed beside it. CPU time a token hardly depends on what else the machine does, the lag does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from halfmoon.deploy.load.arm import ArmOptions, ArmTarget, run_arm
from halfmoon.deploy.load.environment import describe_environment
from halfmoon.deploy.load.summary import Slo
from halfmoon.deploy.load.synthetic_plan import SyntheticOptions, synthetic_plan

TTFT_S = 0.2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--streams", type=int, default=200)
    options.add_argument("--pace", type=float, default=50.0, help="tokens a second of each stream")
    options.add_argument("--seconds", type=float, default=20.0, help="of a stream")
    options.add_argument("--cores", type=int, default=1, help="that the client may use")
    options.add_argument("--out", type=Path)
    arguments = options.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= arguments.cores:
        raise SystemExit(f"the client gets {arguments.cores} of {len(cores)} cores, and the server needs one of its own")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_server.py")), "0", "--ttft", str(TTFT_S), "--gap", str(1 / arguments.pace)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        os.sched_setaffinity(server.pid, cores[arguments.cores :])
        os.sched_setaffinity(0, cores[: arguments.cores])
        found = asyncio.run(measure(url, arguments))
    finally:
        server.terminate()
        server.wait(timeout=10)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": describe_environment(), "arguments": vars(arguments) | {"out": None}, **found}))


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All streams come within a second, so that all are under way together."""
    num_tokens = int(arguments.seconds * arguments.pace)
    shape = {"process": "constant", "input_len": "64", "output_len": str(num_tokens)}
    plan = synthetic_plan(SyntheticOptions(num_requests=arguments.streams, num_warm_up=5, **shape))
    cpu = time.process_time()
    arm = await run_arm(ArmTarget("client", (url,)), plan, ArmOptions(factors=(float(arguments.streams),), slos=(Slo(1.0, 1.0),)))
    cpu = time.process_time() - cpu
    (window,) = arm["windows"]
    summary = window["summary"]
    return {
        "tokens_per_s": summary["output_tokens_per_s"],
        "offered_tokens_per_s": arguments.streams * arguments.pace,
        "tpot_of_pace": {name: value * arguments.pace for name, value in (summary["tpot_s"] or {}).items()},
        "ttft_over_script_s": {name: value - TTFT_S for name, value in (summary["ttft_s"] or {}).items()},
        "itl_s": summary["itl_s"],
        "cpu_us_per_token": cpu / max(summary["num_output_tokens"], 1) * 1e6,
        "outcomes": summary["outcomes"],
        "lag": window["lag"],
    }


if __name__ == "__main__":
    main()
