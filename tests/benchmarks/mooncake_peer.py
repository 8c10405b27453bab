"""Mooncake's transfer engine over TCP between two processes, for `halfmoon bench kvstore --mooncake PYTHON`.

Runs under the Python that has the wheel mooncake-transfer-engine-non-cuda (and Debian's libibverbs1), without Halfmoon. Prints one JSON
line: GB/s and CPU seconds a GB by size and direction. It has no checksums.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ["MC_FORCE_TCP"] = "1"


def engine() -> tuple[Any, str]:
    from mooncake.engine import TransferEngine  # pyright: ignore[reportMissingImports]

    found = TransferEngine()
    if found.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("Mooncake's transfer engine does not start")
    return found, f"127.0.0.1:{found.get_rpc_port()}"


def memory(num_bytes: int) -> Any:
    import numpy as np

    return np.full(num_bytes, 7, np.uint8)


def serve(num_bytes: int) -> None:
    found, name = engine()
    target = memory(num_bytes)
    found.register_memory(target.ctypes.data, num_bytes)
    sys.stdout.write(json.dumps({"name": name, "address": target.ctypes.data}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(sizes: list[int], seconds: float) -> None:
    command = [sys.executable, __file__, "serve", str(max(sizes))]
    target = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert target.stdout is not None and target.stdin is not None
    there = json.loads(target.stdout.readline())
    found, _ = engine()
    source = memory(max(sizes))
    found.register_memory(source.ctypes.data, max(sizes))
    rows = []
    for size in sizes:
        for direction, transfer in (("put", found.transfer_sync_write), ("get", found.transfer_sync_read)):
            rates: list[float] = []
            before, moved, began = cpu_s(target.pid) + cpu_s(os.getpid()), 0, time.perf_counter()
            while time.perf_counter() - began < seconds or len(rates) < 4:
                start = time.perf_counter()
                if transfer(there["name"], source.ctypes.data, there["address"], size) != 0:
                    raise SystemExit("a transfer failed")
                rates.append(size / (time.perf_counter() - start) / 1e9)
                moved += size
            cpu = cpu_s(target.pid) + cpu_s(os.getpid()) - before
            row = {"size": size, "direction": direction, "gb_s": statistics.median(rates), "best": max(rates)}
            rows.append({**row, "cpu_s_gb": cpu / (moved / 1e9)})
    sys.stdout.write(json.dumps(rows) + "\n")
    target.stdin.close()
    target.wait(10)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        main(json.loads(sys.argv[1]), float(sys.argv[2]))
