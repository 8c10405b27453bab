"""What memory this machine, or the container that this process is in, still has."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping. A container's limit counts (cgroup v2)."""
    found = [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        found.append(max(limit - used, 0) + _inactive_file_bytes(cgroup / "memory.stat"))
    return min(found, default=0)


def _number(path: Path) -> int | None:
    """None where there is no such limit: no file, or the word "max" in it."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes(path: Path) -> int:
    """Of the page cache: the kernel gives them up where others need them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def human_bytes(num_bytes: float) -> str:
    """ "1.5 GB", "64.0 MB", "512 bytes"; powers of 1000."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
