"""Resolves ModelOptions on this machine: folder, device, dtype, context length. No torch.

Deploy resolves once and passes concrete values on, because a process without a GPU would read "auto" differently.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path
from typing import Literal

from ..protocol.config import ModelOptions
from ..protocol.errors import ConfigError
from .model_config import ModelConfig

DEMO_FOLDER = Path(__file__).parent / "demo_model"
DEMO_NAME = "halfmoon-demo"


def resolve_folder(options: ModelOptions) -> Path:
    """The model folder. If the options name none: the model that comes with Halfmoon."""
    return Path(options.path).expanduser() if options.path else DEMO_FOLDER


def resolve_name(options: ModelOptions) -> str:
    """The name by which clients call the model."""
    return options.name or (resolve_folder(options).resolve().name if options.path else DEMO_NAME)


def resolve_device(options: ModelOptions) -> Literal["cpu", "cuda"]:
    """ "auto" is CUDA if a GPU is visible and torch can use one."""
    if options.device != "auto":
        return options.device
    return "cuda" if _torch_has_cuda() and _num_visible_gpus() > 0 else "cpu"


def resolve_dtype(config: ModelConfig, options: ModelOptions) -> str:
    """dtype of weights and activations, and of KV unless options.kv_dtype says otherwise. A key of protocol.schema.DTYPE_BYTES."""
    if options.dtype != "auto":
        return options.dtype
    return config.torch_dtype if resolve_device(options) == "cuda" else "float32"


def resolve_max_model_len(config: ModelConfig, options: ModelOptions) -> int:
    """Raises ConfigError if the options ask for more than the model was made for."""
    if options.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {options.max_model_len}; the model was made for at most {config.max_position_embeddings} tokens",
            key="model.max_model_len",
        )
    return options.max_model_len or config.max_position_embeddings


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _num_visible_gpus() -> int:
    """Asks NVML, because CUDA's own call leaves a context behind, with which a later fork fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0
    nvml.nvmlShutdown()
    return 0 if failed else count.value
