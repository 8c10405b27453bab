from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from halfmoon.engine import resolve
from halfmoon.protocol.config import ModelOptions
from halfmoon.protocol.errors import ConfigError


class Nvml:
    """What is asked of libnvidia-ml.so.1, with a number of GPUs of its own."""

    def __init__(self, num_gpus: int, init: int = 0) -> None:
        self.num_gpus, self.init, self.open = num_gpus, init, False

    def nvmlInit_v2(self) -> int:
        self.open = self.init == 0
        return self.init

    def nvmlShutdown(self) -> int:
        self.open = False
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = self.num_gpus
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:
        return 0

    def nvmlDeviceGetName(self, handle, name, size) -> int:
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory) -> int:
        return 0


@pytest.fixture
def machine(monkeypatch):
    def build(nvml: Nvml | None, torch_version: str = "2.11.0", visible: str | None = None) -> None:
        def load(name: str) -> Nvml:
            if nvml is None:
                raise OSError(f"{name}: cannot open shared object file")
            return nvml

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(resolve.importlib.metadata, "version", lambda name: torch_version)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return build


def test_auto_is_cuda_where_a_gpu_is_there_and_torch_can_use_it(machine):
    nvml = Nvml(2)
    machine(nvml)
    assert resolve.resolve_device(ModelOptions()) == "cuda" and not nvml.open


@pytest.mark.parametrize(
    ("nvml", "torch_version", "visible"),
    [
        (None, "2.11.0", None),
        (Nvml(0), "2.11.0", None),
        (Nvml(1, init=9), "2.11.0", None),
        (Nvml(1), "2.13.0+cpu", None),
        (Nvml(1), "2.11.0", ""),
        (Nvml(1), "2.11.0", "-1"),
    ],
)
def test_auto_is_cpu_without_driver_gpu_cuda_torch_or_a_visible_device(machine, nvml, torch_version, visible):
    machine(nvml, torch_version, visible)
    assert resolve.resolve_device(ModelOptions()) == "cpu"


def test_a_named_device_is_taken_as_it_is(machine):
    machine(None)
    assert resolve.resolve_device(ModelOptions(device="cuda")) == "cuda"


def test_no_path_means_the_model_that_comes_along():
    folder = resolve.resolve_folder(ModelOptions())
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    assert resolve.resolve_folder(ModelOptions(path="/models/x")).as_posix() == "/models/x"


def test_a_model_is_called_as_asked_else_as_its_folder():
    assert resolve.resolve_name(ModelOptions()) == "halfmoon-demo"
    assert resolve.resolve_name(ModelOptions(path="/models/x/")) == "x"
    assert resolve.resolve_name(ModelOptions(path="/models/x", name="y")) == "y"


def test_the_demo_model_is_that_of_the_checkout_else_of_its_own_wheel_else_an_error_says_what_to_do(monkeypatch, tmp_path) -> None:
    assert resolve.resolve_folder(ModelOptions()) == resolve.DEMO_FOLDER
    monkeypatch.setattr(resolve, "DEMO_FOLDER", tmp_path / "without_weights")
    with pytest.raises(ConfigError, match="the weights of the demo model are not installed"):
        resolve.resolve_folder(ModelOptions())
    installed = tmp_path / "installed" / resolve.DEMO_PACKAGE
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(installed.parent))
    assert resolve.resolve_folder(ModelOptions()) == installed
    assert resolve.resolve_folder(ModelOptions(path="somewhere")) == Path("somewhere")
