"""GPUs by NVML, over a library of the test's own."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

import halfmoon.engine.gpus as module
from halfmoon.engine.gpus import visible_gpus

NAMES = ["H100", "H200", "L4"]


class Nvml:
    """index is the handle."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(NAMES)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: Any) -> int:
        name.value = NAMES[handle.value - 1].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 100 * handle.value, 90 * handle.value
        return 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, NAMES), ("", []), ("-1", []), ("2,0", ["L4", "H100"]), ("7", []), ("GPU-abc,GPU-def", ["H100", "H200"])],
)
def test_those_that_cuda_may_see_are_listed(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = visible_gpus()
    assert [gpu.name for gpu in found] == names
    assert all((gpu.total_bytes, gpu.free_bytes) == (100 * (NAMES.index(gpu.name) + 1), 90 * (NAMES.index(gpu.name) + 1)) for gpu in found)


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module.ctypes, "CDLL", missing)
    assert visible_gpus() == []
