"""What a worker takes of its device's memory, by the model's shape and the checkpoint's headers, before anything is loaded. No torch.

weights      exact but for norms and biases
workspace    of the largest step: activations of its tokens, and fp32 logits                                    about
graphs       on CUDA: the logits that each captured size keeps, and the activations of the largest              about
pages        kv_capacity_tokens, or what is left
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..protocol.config import ModelOptions
from ..protocol.schema import DTYPE_BYTES
from .checkpoint import list_tensors
from .graph_sizes import MAX_CAPTURED_ROWS, batch_sizes
from .model_config import ModelConfig
from .model_flops import num_parameters
from .quantization import Quantization, int4_group
from .resolve import resolve_dtype, resolve_quantization
from .tensor_info import TensorInfo

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one worker, but for its pages."""

    weights: int
    workspace: int
    graphs: int

    @property
    def fixed(self) -> int:
        return self.weights + self.workspace + self.graphs

    @classmethod
    def of_worker(
        cls, folder: Path, config: ModelConfig, options: ModelOptions, *, max_tokens: int, max_sequences: int, has_graphs: bool
    ) -> MemoryNeed:
        """max_tokens: of a step; max_sequences: that decode in one. Raises CheckpointError, ConfigError."""
        number = DTYPE_BYTES[resolve_dtype(config, options)]
        row = activation_bytes(config, number)
        workspace = max_tokens * row + 4 * max_sequences * config.vocab_size
        # decode steps and steps with chunks have heads of their own, of as many rows each
        graphs = 2 * 4 * sum(batch_sizes(max_sequences)) * config.vocab_size + min(MAX_CAPTURED_ROWS, max_tokens) * row if has_graphs else 0
        return cls(weight_bytes(folder, config, options), workspace, graphs)


def activation_bytes(config: ModelConfig, number: int) -> int:
    """Of one token in a layer: residual and hidden state twice, and the larger of attention's part and the MLP's. number: bytes of one."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp, mixture = 3 * config.intermediate_size, config.mixture
    if mixture is not None:  # of each of the token's experts: its middle and its term
        mlp = max(mlp, mixture.num_experts_per_token * (mixture.intermediate_size + config.hidden_size))
    return number * (4 * config.hidden_size + max(attention, mlp))


def weight_bytes(folder: Path, config: ModelConfig, options: ModelOptions) -> int:
    """Of the whole model as a worker holds it. Raises CheckpointError for files that can't be read, ConfigError as resolve_quantization."""
    number, quantization = DTYPE_BYTES[resolve_dtype(config, options)], resolve_quantization(config, options)
    if quantization is None:
        return num_parameters(config) * number
    if quantization.method == "load" or options.load_format == "dummy":
        return _made_bytes(config, quantization, number)
    return sum(_held_bytes(name, info, number) for name, info in list_tensors(folder).items())


def _held_bytes(name: str, info: TensorInfo, number: int) -> int:
    """Quantised tensors and their scales stay as they are in the file; others become model.dtype."""
    kind = name.rpartition(".")[2]
    if kind in ("g_idx", "weight_g_idx", "weight_shape", "input_scale", "k_scale", "v_scale"):
        return 0
    if kind == "qzeros" or (kind == "weight_zero_point" and info.dtype == "I32"):
        return 2 * info.num_bytes  # four bits become a byte
    if kind in ("weight", "bias") and (info.dtype in FLOATS or "layers." not in name):
        return math.prod(info.shape) * number
    return info.num_bytes


def _made_bytes(config: ModelConfig, quantization: Quantization, number: int) -> int:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = [
        (q_size + 2 * kv_size, config.hidden_size),
        (config.hidden_size, q_size),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]
    if quantization.kind == "int4":
        layer = sum(rows * (columns // 2 + columns // int4_group(columns) * (number + 1)) for rows, columns in matrices)
    else:
        layer = sum(rows * columns + 4 * rows for rows, columns in matrices)
    plain = num_parameters(config) - config.num_layers * sum(rows * columns for rows, columns in matrices)
    return config.num_layers * layer + plain * number
