"""This machine as processes of Halfmoon find it: versions, limits, devices, load, and room for Ray's files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from pathlib import Path

from ...engine.gpus import visible_gpus
from ...protocol.memory import SHM, available_bytes, human_bytes
from ...protocol.version import package_version
from ..checks.finding import Finding, ok

PACKAGES = ("torch", "ray", "grpcio", "protobuf", "tokenizers", "numpy")
MIN_FILES = 4096  # descriptors: a stream of a client takes one, a member some tens
BUSY = 2.0  # processes that want to run, for each core
RAY_FOLDER = Path("/tmp")
RAY_FULL = 0.95  # from here on Ray refuses to write


def look_at_environment() -> list[Finding]:
    return [_versions(), _open_files(), _locked_memory(), _shared_memory(), _load(), _ray_folder()]


def _versions() -> Finding:
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("versions", "fault", f"{', '.join(missing)} cannot be found", "pip install 'halfmoon[server]'")
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    return ok("versions", f"halfmoon {package_version()}, Python {platform.python_version()}, {listed}")


def _open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < MIN_FILES:
        return Finding("open files", "warning", f"a process may open {limit} files, and every stream takes one", f"ulimit -n {MIN_FILES}")
    return ok("open files", f"a process may open {limit}")


def _locked_memory() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("memlock", "memory may be locked without limit")
    what = f"{human_bytes(limit)} of memory may be locked"
    if not visible_gpus():
        return ok("memlock", f"{what}; only GPUs need more")
    return Finding(
        "memlock", "slow", f"{what}, and the arena is pinned for GPUs", "ulimit -l unlimited, or a container's --ulimit memlock=-1"
    )


def _shared_memory() -> Finding:
    found = os.statvfs(SHM)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return ok("memory", f"{human_bytes(available_bytes())} of memory are free, and {human_bytes(free)} of {human_bytes(total)} in {SHM}")


def _load() -> Finding:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > BUSY * cores:
        what = f"this machine is busy: {load:.1f} processes want to run on {cores} cores"
        return Finding("load", "warning", what, "measurements made here say little; find out who else runs (`top`)")
    return ok("load", f"{load:.1f} processes on {cores} cores")


def _ray_folder() -> Finding:
    used = shutil.disk_usage(RAY_FOLDER)
    if used.free < (1 - RAY_FULL) * used.total:
        what = f"{RAY_FOLDER} has {human_bytes(used.free)} of {human_bytes(used.total)} left; Ray stops writing its files at {RAY_FULL:.0%}"
        return Finding("disk", "warning", what, f"make room in {RAY_FOLDER}, for instance of old sessions in {RAY_FOLDER / 'ray'}")
    return ok("disk", f"{human_bytes(used.free)} are free in {RAY_FOLDER} for Ray's files")
