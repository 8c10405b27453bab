"""GPUs as their makers' data sheets have them."""

from __future__ import annotations

from typing import NamedTuple

from ...engine.model_flops import PEAK_FLOPS
from ...protocol.errors import ConfigError


class Gpu(NamedTuple):
    title: str
    peak_flops: float  # dense, 16 bit
    bytes_per_s: float  # of its memory
    memory_bytes: float
    nvlink_bytes_per_s: float  # each way
    host_bytes_per_s: float  # each way


GPUS = {
    "a100": Gpu("A100 SXM 80GB", PEAK_FLOPS["A100"], 2.039e12, 80e9, 300e9, 32e9),
    "h100": Gpu("H100 SXM 80GB", PEAK_FLOPS["H100"], 3.35e12, 80e9, 450e9, 64e9),
    "h200": Gpu("H200 SXM 141GB", PEAK_FLOPS["H200"], 4.8e12, 141e9, 450e9, 64e9),
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError naming those that are known."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"no GPU {name!r}; choose of {', '.join(GPUS)}, or give a cost model of your own by --cost-model")
    return found
