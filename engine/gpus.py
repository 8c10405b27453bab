"""The GPUs of this machine that this process may use, by NVML. CUDA's own calls leave a context behind, with which a later fork fails."""

from __future__ import annotations

import ctypes
import os
from typing import Any, NamedTuple

MAX_NAME_BYTES = 96


class Gpu(NamedTuple):
    name: str
    total_bytes: int
    free_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves; none where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    if names is not None and names[0] in ("", "-1"):
        return []
    nvml = _nvml()
    if nvml is None:
        return []
    try:
        found = _gpus(nvml)
    finally:
        nvml.nvmlShutdown()
    if names is None:
        return found
    if all(name.isdigit() for name in names):
        return [found[int(name)] for name in names if int(name) < len(found)]
    return found[: len(names)]  # UUIDs: as many, whichever they are


def _nvml() -> Any:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


def _gpus(nvml: Any) -> list[Gpu]:
    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    gpus: list[Gpu] = []
    for index in range(count.value):
        handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(MAX_NAME_BYTES), _Memory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
            continue
        nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(MAX_NAME_BYTES))
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        gpus.append(Gpu(name.value.decode(errors="replace"), memory.total, memory.free))
    return gpus
