from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from halfmoon.kernels import dispatch


@pytest.fixture(autouse=True)
def fresh_cache():
    dispatch._find.cache_clear()
    yield
    dispatch._find.cache_clear()


def serve(monkeypatch, modules: dict[str, object]) -> list[str]:
    """Makes import_module find modules alone; the names asked for."""
    asked: list[str] = []

    def load(name: str) -> object:
        asked.append(name.removeprefix("halfmoon.kernels."))
        found = modules.get(asked[-1])
        if found is None:
            raise ModuleNotFoundError(name, name=name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(dispatch.importlib, "import_module", load)
    return asked


class Module:
    silu_mul = "the kernel"


def test_cpu_takes_the_reference():
    from halfmoon.kernels.reference.silu_mul import silu_mul

    assert dispatch.implementation("silu_mul", torch.device("cpu")) is silu_mul


def test_hopper_is_tried_first_on_sm_90_alone(monkeypatch):
    asked = serve(monkeypatch, {"portable.silu_mul": Module})
    assert dispatch._find("silu_mul", (9, 0)) == "the kernel"
    assert asked == ["hopper.silu_mul", "portable.silu_mul"]
    asked.clear()
    assert dispatch._find("silu_mul", (8, 0)) == "the kernel"
    assert asked == ["portable.silu_mul"]


def test_a_module_may_hold_more_than_the_function_of_its_name():
    from halfmoon.kernels.reference.kv_pack import kv_unpack

    assert dispatch.implementation("kv_pack", torch.device("cpu"), "kv_unpack") is kv_unpack


def test_an_absent_triton_falls_back_to_the_reference(monkeypatch):
    missing = ModuleNotFoundError("No module named 'triton.language'", name="triton.language")
    serve(monkeypatch, {"portable.silu_mul": missing, "reference.silu_mul": Module})
    assert dispatch._find("silu_mul", (8, 9)) == "the kernel"


def test_a_broken_kernel_is_not_passed_over(monkeypatch):
    serve(monkeypatch, {"portable.silu_mul": ModuleNotFoundError("No module named 'sipl'", name="sipl"), "reference.silu_mul": Module})
    with pytest.raises(ModuleNotFoundError, match="sipl"):
        dispatch._find("silu_mul", (8, 9))


def test_the_choosers_import_no_triton_on_cpu():
    stems = ("flash_prefill", "kv_pack", "kv_write", "paged_decode", "rms_norm", "sampling", "silu_mul")
    lines = "".join(f"import halfmoon.kernels.{stem}\n" for stem in stems)
    # torch itself may bring triton, so what is held here is that ours do not name it
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\n{lines}assert not [m for m in set(sys.modules) - before if m.startswith('triton')]"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
