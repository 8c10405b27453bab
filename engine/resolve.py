"""Resolves ModelOptions on this machine: folder, device, dtype, context length. No torch.

Deploy resolves once and passes concrete values on, because a process without a GPU would read "auto" differently.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Literal

from ..protocol.config import ModelOptions
from ..protocol.errors import ConfigError
from .checkpoint import SINGLE
from .gpus import visible_gpus
from .model_config import ModelConfig
from .quantization import Quantization, made_at_load

DEMO_FOLDER = Path(__file__).parent / "demo_model"
DEMO_PACKAGE = "halfmoon_demo_model"
"""Of the wheel that brings the same folder, because Halfmoon's own wheel has not the weights."""
DEMO_NAME = "halfmoon-demo"


def resolve_folder(options: ModelOptions) -> Path:
    """The model folder. If the options name none: the demo model's. Raises ConfigError where its weights are not installed."""
    return Path(options.path).expanduser() if options.path else _demo_folder()


def resolve_name(options: ModelOptions) -> str:
    """The name by which clients call the model."""
    return options.name or (resolve_folder(options).resolve().name if options.path else DEMO_NAME)


def resolve_device(options: ModelOptions) -> Literal["cpu", "cuda"]:
    """ "auto" is CUDA if a GPU is visible and torch can use one."""
    if options.device != "auto":
        return options.device
    return "cuda" if torch_has_cuda() and visible_gpus() else "cpu"


def resolve_dtype(config: ModelConfig, options: ModelOptions) -> str:
    """dtype of weights and activations, and of KV unless options.kv_dtype says otherwise. A key of protocol.schema.DTYPE_BYTES."""
    if options.dtype != "auto":
        return options.dtype
    return config.torch_dtype if resolve_device(options) == "cuda" else "float32"


def resolve_quantization(config: ModelConfig, options: ModelOptions) -> Quantization | None:
    """How the layers' matrices are kept and multiplied; None: in resolve_dtype's numbers, whatever the checkpoint holds.

    Raises ConfigError for another kind than the checkpoint's: to quantise anew what is rounded already would only lose more.
    """
    found, wanted = config.quantization, options.quantization
    if config.mixture is not None and wanted not in ("auto", "none"):
        raise ConfigError(
            f"model.quantization is {wanted} and the model is a mixture of experts, which are not quantised; set it to auto",
            key="model.quantization",
        )
    if wanted == "auto":
        return found
    if wanted == "none":
        return None
    if found is not None and found.kind != wanted:
        raise ConfigError(
            f"model.quantization is {wanted} and the checkpoint is {found.told()}; set it to auto, or to none to have 16-bit weights",
            key="model.quantization",
        )
    return found or made_at_load(wanted)


def resolve_max_model_len(config: ModelConfig, options: ModelOptions) -> int:
    """Raises ConfigError if the options ask for more than the model was made for."""
    if options.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {options.max_model_len}; the model was made for at most {config.max_position_embeddings} tokens",
            key="model.max_model_len",
        )
    return options.max_model_len or config.max_position_embeddings


def _demo_folder() -> Path:
    if (DEMO_FOLDER / SINGLE).exists():
        return DEMO_FOLDER
    package = importlib.util.find_spec(DEMO_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            "no model is named, and the weights of the demo model are not installed; name a model's folder, or install the wheel of "
            "engine/demo_model",
            key="model.path",
        )
    return Path(package.submodule_search_locations[0])


def torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
