"""A model's fingerprint: equal on two machines only if the same weights run under the same configuration. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from .checkpoint import list_tensors
from .model_config import ModelConfig
from .quantization import Quantization
from .tensor_info import TensorInfo

# keys that say when to stop or how the file is stored, and do not change a token's KV
UNRELATED = ("eos_token_ids", "bos_token_id", "torch_dtype", "quantization")
NUM_SAMPLES = 8
SAMPLE_BYTES = 64


def model_fingerprint(folder: Path, load_format: str, quantization: Quantization | None = None) -> str:
    """32 hexadecimal digits over the configuration, every tensor's name, dtype and shape, and sampled bytes of each.

    quantization: how the matrices are read or made at load (resolve_quantization): the same files then give other keys and values.

    Sampling takes milliseconds, while hashing a large checkpoint takes minutes. It tells models and their finetunes
    apart, but does not protect against forging. load_format "dummy": only the configuration.

    Raises CheckpointError as ModelConfig.from_folder and list_tensors do.
    """
    config = dataclasses.asdict(ModelConfig.from_folder(folder))
    described = sorted((key, value) for key, value in config.items() if key not in UNRELATED)
    digest = hashlib.blake2b(repr((load_format, described)).encode(), digest_size=16)
    if quantization is not None:
        digest.update(repr(dataclasses.astuple(quantization)).encode())
    if load_format != "dummy":
        for name, info in sorted(list_tensors(folder).items()):
            digest.update(repr((name, info.dtype, info.shape)).encode())
            digest.update(_sample(info))
    return digest.hexdigest()


def _sample(info: TensorInfo) -> bytes:
    """NUM_SAMPLES runs of bytes, spread evenly over the tensor."""
    with info.file.open("rb") as file:
        if info.num_bytes <= NUM_SAMPLES * SAMPLE_BYTES:
            file.seek(info.offset)
            return file.read(info.num_bytes)
        found = bytearray()
        for index in range(NUM_SAMPLES):
            file.seek(info.offset + (info.num_bytes - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
            found += file.read(SAMPLE_BYTES)
        return bytes(found)
