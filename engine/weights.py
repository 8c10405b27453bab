"""A decoder's weights as its forward pass reads them, and where each comes from in a checkpoint.

checkpoint                                    DecoderWeights
q_proj, k_proj, v_proj  ──── rows of ────►    layers[l].qkv
gate_proj, up_proj      ──── rows of ────►    layers[l].gate_up
lm_head (or embed_tokens where tied)  ───►    lm_head
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open

from ..protocol.errors import CheckpointError
from .checkpoint import TensorInfo, list_tensors
from .executor import Progress
from .model_config import ModelConfig
from .shard import WHOLE, Shard

DUMMY_SEED = 20_000
DUMMY_STD = 0.02
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Matrices are [out, in], as torch.nn.functional.linear takes them."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor  # embed itself where tied

    @property
    def num_bytes(self) -> int:
        layers = [getattr(layer, field.name) for layer in self.layers for field in fields(layer)]
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (self.embed, self.norm, self.lm_head, *layers) if tensor is not None}
        return sum(tensors.values())


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None, shard: Shard = WHOLE
) -> DecoderWeights:
    """Reads every tensor once, converting to dtype; of the divided ones the shard's part alone.

    Raises CheckpointError that names a missing or misshapen tensor.
    """
    tensors = list_tensors(folder)
    weights = _empty_weights(config, dtype, device, shard)
    targets = dict(_targets(weights, shard.part_of(config)))
    for name, target in targets.items():
        _require(folder, name, tensors.get(name), shard.whole_shape(name, tuple(target.shape)))
    num_bytes = sum(tensors[name].num_bytes for name in targets)
    num_bytes_done = 0
    for file in sorted({tensors[name].file for name in targets}):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name, target in targets.items():
                if tensors[name].file != file:
                    continue
                whole = shard.axis(name) is None
                target.copy_(opened.get_tensor(name) if whole else opened.get_slice(name)[shard.part(name, tuple(target.shape))])
                num_bytes_done += tensors[name].num_bytes
                if progress is not None:
                    progress("loading weights", num_bytes_done, num_bytes)
    return weights


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None = None, shard: Shard = WHOLE
) -> DecoderWeights:
    """Random weights of the config's shape, the same ones every time on one kind of device, however they are divided."""
    weights = _empty_weights(config, dtype, device, shard)
    targets = dict(_targets(weights, shard.part_of(config)))
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    num_bytes = sum(target.nbytes for target in targets.values())
    num_bytes_done = 0
    for name, target in targets.items():
        shape = tuple(target.shape)
        if target.dim() == 1:
            target.fill_(1.0)
        elif shard.axis(name) is None:
            target.normal_(0.0, DUMMY_STD, generator=generator)
        else:
            whole = target.new_empty(shard.whole_shape(name, shape)).normal_(0.0, DUMMY_STD, generator=generator)
            target.copy_(whole[shard.part(name, shape)])
        num_bytes_done += target.nbytes
        if progress is not None:
            progress("making random weights", num_bytes_done, num_bytes)
    return weights


def _empty_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard) -> DecoderWeights:
    """config: of the whole model."""
    vocab_size, config = config.vocab_size // shard.size, shard.part_of(config)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, intermediate = config.hidden_size, config.intermediate_size
    num_q, num_qkv = config.num_heads * config.head_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(num_qkv, hidden),
            qkv_bias=empty(num_qkv) if config.qkv_bias else None,
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            o=empty(hidden, num_q),
            o_bias=empty(hidden) if config.o_bias and shard.adds_bias else None,
            post_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            gate_up_bias=empty(2 * intermediate) if config.mlp_bias else None,
            down=empty(hidden, intermediate),
            down_bias=empty(hidden) if config.mlp_bias and shard.adds_bias else None,
        )
        for _ in range(config.num_layers)
    ]
    embed = empty(vocab_size, hidden)
    lm_head = embed if config.tie_word_embeddings else empty(vocab_size, hidden)
    return DecoderWeights(embed, layers, empty(hidden), lm_head)


def _targets(weights: DecoderWeights, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its name there, and the view that it fills."""
    yield "model.embed_tokens.weight", weights.embed
    yield "model.norm.weight", weights.norm
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head
    rows = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        named: list[tuple[str, torch.Tensor | None]] = [
            (f"{prefix}.input_layernorm.weight", layer.input_norm),
            (f"{attention}.q_norm.weight", layer.q_norm),
            (f"{attention}.k_norm.weight", layer.k_norm),
            (f"{attention}.o_proj.weight", layer.o),
            (f"{attention}.o_proj.bias", layer.o_bias),
            (f"{prefix}.post_attention_layernorm.weight", layer.post_norm),
            (f"{mlp}.down_proj.weight", layer.down),
            (f"{mlp}.down_proj.bias", layer.down_bias),
        ]
        for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
            if qkv is not None:
                named += zip((f"{attention}.{part}_proj.{kind}" for part in "qkv"), qkv.split(rows), strict=True)
            if gate_up is not None:
                named += zip((f"{mlp}.{part}_proj.{kind}" for part in ("gate", "up")), gate_up.chunk(2), strict=True)
        for name, target in named:
            if target is not None:
                yield name, target


def _require(folder: Path, name: str, info: TensorInfo | None, shape: tuple[int, ...]) -> None:
    if info is None:
        raise CheckpointError(f"{folder} has no tensor {name}; its config.json asks for it", tensor=name)
    if info.shape != shape:
        raise CheckpointError(f"{info.file}: {name} has shape {list(info.shape)}; config.json asks for {list(shape)}", tensor=name)
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{info.file}: {name} is of dtype {info.dtype}; supported are {', '.join(FLOAT_DTYPES)}", tensor=name)
