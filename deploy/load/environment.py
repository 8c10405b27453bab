"""On what machine and with what versions a run was made, for later readers of its figures."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("halfmoon", "aiohttp", "numpy", "vllm", "torch", "ray")
SECRETS = ("--api-key",)
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def describe_environment() -> dict[str, Any]:
    """Describes the machine that the load comes from, and the server too if it is on the same machine."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": os.environ.get("HALFMOON_COMMIT") or next(iter(_lines("git", "-C", str(PACKAGE_ROOT), "rev-parse", "HEAD")), None),
    }


def shown_command(arguments: Sequence[str]) -> str:
    """The command line, ready to be typed again, without secrets."""
    shown: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        hidden = shown and shown[-1] in SECRETS
        shown.append("***" if hidden else f"{flag}=***" if equals and flag in SECRETS else argument)
    return shlex.join(shown)


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines(*command: str) -> list[str]:
    """The lines that a program prints; none if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
