"""Which implementation of a kernel runs on a device.

CPU  ─► reference                      plain torch
CUDA ─► hopper (sm_90) ─► portable ─► reference      the first whose module is there and whose imports are

An implementation module has the kernel's name and signature: kernels/<folder>/<stem>.py defines <stem>, and what goes with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = __name__.rpartition(".")[0]


def implementation(stem: str, device: torch.device, function: str = "") -> Callable[..., Any]:
    """The function of that name, or <stem>, of the module <stem> for tensors of device."""
    return _find(stem, torch.cuda.get_device_capability(device) if device.type == "cuda" else None, function)


@functools.cache
def _find(stem: str, capability: tuple[int, int] | None, function: str = "") -> Callable[..., Any]:
    for folder in _folders(capability):
        name = f"{PACKAGE}.{folder}.{stem}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # an absent kernel or an absent triton is a reason to go on; anything else missing is a broken kernel
            if error.name in (name, name.rpartition(".")[0]) or (error.name or "").split(".")[0] == "triton":
                continue
            raise
        return getattr(module, function or stem)
    raise ModuleNotFoundError(f"no implementation of {stem} in {PACKAGE}")


def _folders(capability: tuple[int, int] | None) -> tuple[str, ...]:
    if capability is None:
        return ("reference",)
    return ("hopper", "portable", "reference") if capability[0] == 9 else ("portable", "reference")
