"""The KVSchema of a model under its options: what deploy, proxy, stores and workers compare. No torch."""

from __future__ import annotations

from ..protocol.config import ModelOptions
from ..protocol.schema import KVSchema
from .fingerprint import model_fingerprint
from .model_config import ModelConfig
from .resolve import resolve_dtype, resolve_folder, resolve_quantization


def kv_schema(config: ModelConfig, options: ModelOptions) -> KVSchema:
    """config: that of the options' folder. Raises CheckpointError if the folder's tensors can't be read, ConfigError for
    a quantization that is not the checkpoint's."""
    return KVSchema(
        model_fingerprint=model_fingerprint(resolve_folder(options), options.load_format, resolve_quantization(config, options)),
        dtype="float8_e4m3fn" if options.kv_dtype == "fp8" else resolve_dtype(config, options),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=options.block_size,
    )
