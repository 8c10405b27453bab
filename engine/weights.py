"""A decoder's weights as its forward pass reads them, and where each comes from in a checkpoint.

checkpoint                                    DecoderWeights
q_proj, k_proj, v_proj  ──── rows of ────►    layers[l].qkv
gate_proj, up_proj      ──── rows of ────►    layers[l].mlp.gate_up, of each expert in a mixture
lm_head (or embed_tokens where tied)  ───►    lm_head

Matrices of layers may be quantised, in the checkpoint or at load: those are made one by one and not filled in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..protocol.errors import CheckpointError, ConfigError
from .executor import Progress
from .linears import DenseLinear, Linear, NarrowLinear, stacked
from .mlp import DenseMLP, MixtureMLP
from .model_config import MixtureConfig, ModelConfig
from .quantization import Quantization
from .quantize import quantize
from .quantized_checkpoint import read_matrix
from .shard import WHOLE, Shard
from .tensor_reader import FLOAT_DTYPES, TensorReader

DUMMY_SEED = 20_000
DUMMY_STD = 0.02
META = torch.device("meta")  # a matrix there has a shape and no numbers: a quantised one takes its place


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    mlp: DenseMLP | MixtureMLP

    def linears(self) -> dict[str, Linear]:
        """Those that may be quantised."""
        return {"qkv": self.qkv, "o": self.o, **self.mlp.linears()}

    def with_linears(self, qkv: Linear, o: Linear, gate_up: Linear, down: Linear) -> LayerWeights:
        return dataclasses.replace(self, qkv=qkv, o=o, mlp=DenseMLP(gate_up, down))

    def tensors(self) -> Iterator[torch.Tensor]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Linear, DenseMLP, MixtureMLP)):
                yield from value.tensors()
            elif value is not None:
                yield value


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor  # embed itself where tied

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.embed, self.norm, self.lm_head)
        for layer in self.layers:
            yield from layer.tensors()

    @property
    def num_bytes(self) -> int:
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self.tensors()}.values())


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
    shard: Shard = WHOLE,
) -> DecoderWeights:
    """Reads every tensor once, converting to dtype; of the divided ones the shard's part alone, where they are not quantised.

    quantization: of the layers' matrices (resolve_quantization). Raises CheckpointError that names a missing or misshapen tensor,
    ConfigError where a shard would cut a group of numbers that share a scale.
    """
    quantized = quantization is not None or config.quantization is not None
    weights, own = _empty_weights(config, dtype, device, META if quantized else device, shard), shard.part_of(config)
    with TensorReader(folder, progress) as reader:
        targets = {name: target for name, target in _targets(weights, own) if target.device != META}
        packed = {name for name in targets if quantized and name == "lm_head.weight" and reader.dtype(name) not in FLOAT_DTYPES}
        for name, target in targets.items():
            if name not in packed:
                reader.require(name, shard.whole_shape(name, tuple(target.shape)))
        num_bytes = reader.num_bytes_of(name for name, _ in _targets(weights, own))
        for name in reader.file_order([name for name in targets if name not in packed]):
            whole = shard.axis(name) is None
            targets[name].copy_(reader.read(name, None if whole else shard.part(name, tuple(targets[name].shape))))
            reader.tell(num_bytes)
        for name in packed:
            module, part = name.removesuffix(".weight"), shard.part(name, tuple(targets[name].shape))
            head = read_matrix(reader, module, (config.vocab_size, config.hidden_size), config.quantization).dequantized()
            targets[name].copy_(head[part])
        if not quantized:
            return weights
        layers = []
        for index, layer in enumerate(weights.layers):
            layers.append(_quantized_layer(reader, index, layer, config, quantization, dtype, shard))
            reader.tell(num_bytes)
    return dataclasses.replace(weights, layers=layers)


def _quantized_layer(
    reader: TensorReader,
    index: int,
    layer: LayerWeights,
    config: ModelConfig,
    quantization: Quantization | None,
    dtype: torch.dtype,
    shard: Shard,
) -> LayerWeights:
    """layer with matrices in the place of those on META. config: of the whole model."""
    device, made = layer.input_norm.device, dict[str, Linear]()
    for field, modules in _modules(shard.part_of(config), index).items():
        whole = layer.linears()[field]
        parts = []
        for name, num_rows in modules:
            shape = (num_rows, whole.weight.shape[1])
            num_out, num_in = shard.whole_shape(f"{name}.weight", shape)
            part = read_matrix(reader, name, (num_out, num_in), config.quantization).to(device)
            if quantization is None:
                part = DenseLinear(weight=part.dequantized().to(dtype))
            elif isinstance(part, DenseLinear):
                part = quantize(part.weight.to(dtype), quantization.kind) if quantization.method == "load" else part.cast(dtype)
            parts.append(_cut(part, f"{name}.weight", shape, shard))
        if len({type(part) for part in parts}) > 1:
            raise CheckpointError(
                f"{reader.folder}: {', '.join(name for name, _ in modules)} are computed as one and only some of them are quantised"
            )
        made[field] = dataclasses.replace(stacked(parts), bias=whole.bias)
    return layer.with_linears(**made)


def _cut(linear: Linear, name: str, shape: tuple[int, int], shard: Shard) -> Linear:
    """The shard's part, of that shape, of a whole matrix. Quantised before it is cut, a number is the same on ranks of any group."""
    rows, columns = shard.part(name, shape)
    if isinstance(linear, NarrowLinear) and shard.axis(name) == 0 and shape[0] % linear.row_block:
        linear = linear.by_rows()
    try:
        if shard.axis(name) == 0:
            return linear.rows(rows.start, rows.stop)
        return linear if shard.axis(name) is None else linear.columns(columns.start, columns.stop)
    except ValueError as error:
        raise ConfigError(
            f"tensor_parallel is {shard.size}, which cuts {name} inside a group of a scale: {error}; take fewer ranks or another "
            "model.quantization",
            key="tensor_parallel",
        ) from error


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
    shard: Shard = WHOLE,
) -> DecoderWeights:
    """Random weights of the config's shape, the same ones every time on one kind of device, however they are divided. quantization: its
    kind is made of them."""
    weights = _empty_weights(config, dtype, device, META if quantization else device, shard)
    targets = dict(_targets(weights, shard.part_of(config)))
    generator = torch.Generator(device).manual_seed(DUMMY_SEED)
    num_bytes = sum(target.nbytes for target in targets.values())
    num_bytes_done = 0

    def normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Whole."""
        return torch.empty(shard.whole_shape(name, shape), dtype=dtype, device=device).normal_(0.0, DUMMY_STD, generator=generator)

    for name, target in targets.items():
        shape = tuple(target.shape)
        if target.dim() == 1:
            target.fill_(1.0)
        elif target.device != META and shard.axis(name) is None:
            target.normal_(0.0, DUMMY_STD, generator=generator)
        elif target.device != META:
            target.copy_(normal(name, shape)[shard.part(name, shape)])
        num_bytes_done += target.nbytes if target.device != META else 0
        if progress is not None:
            progress("making random weights", num_bytes_done, num_bytes)
    if quantization is None:
        return weights
    layers = []
    for index, layer in enumerate(weights.layers):
        made = dict[str, Linear]()
        for field, modules in _modules(shard.part_of(config), index).items():
            whole, parts = layer.linears()[field], []
            for name, num_rows in modules:
                shape = (num_rows, whole.weight.shape[1])
                parts.append(_cut(quantize(normal(f"{name}.weight", shape), quantization.kind), f"{name}.weight", shape, shard))
            made[field] = dataclasses.replace(stacked(parts), bias=whole.bias)
            num_bytes_done += whole.weight.nbytes
            if progress is not None:
                progress("making random weights", num_bytes_done, num_bytes)
        layers.append(layer.with_linears(**made))
    return dataclasses.replace(weights, layers=layers)


def _empty_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, matrices: torch.device, shard: Shard) -> DecoderWeights:
    """config: of the whole model. matrices: where those of the layers are."""
    vocab_size, config = config.vocab_size // shard.size, shard.part_of(config)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def matrix(num_out: int, num_in: int, biased: bool) -> DenseLinear:
        return DenseLinear(weight=torch.empty(num_out, num_in, dtype=dtype, device=matrices), bias=empty(num_out) if biased else None)

    def mlp(layer: int) -> DenseMLP | MixtureMLP:
        if config.mixture is not None and config.has_experts(layer):
            return mixture(config.mixture)
        gate_up = matrix(2 * config.intermediate_size, hidden, config.mlp_bias)
        return DenseMLP(gate_up, matrix(hidden, config.intermediate_size, config.mlp_bias and shard.adds_bias))

    def mixture(of: MixtureConfig) -> MixtureMLP:
        count, width = of.num_experts, of.intermediate_size
        gate_up, down = empty(count, 2 * width, hidden), empty(count, hidden, width)
        return MixtureMLP(empty(count, hidden), gate_up, down, of.num_experts_per_token, of.is_normalized)

    hidden = config.hidden_size
    num_q, num_qkv = config.num_heads * config.head_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = [
        LayerWeights(
            input_norm=empty(hidden),
            qkv=matrix(num_qkv, hidden, config.qkv_bias),
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            o=matrix(hidden, num_q, config.o_bias and shard.adds_bias),
            post_norm=empty(hidden),
            mlp=mlp(index),
        )
        for index in range(config.num_layers)
    ]
    embed = empty(vocab_size, hidden)
    lm_head = embed if config.tie_word_embeddings else empty(vocab_size, hidden)
    return DecoderWeights(embed, layers, empty(hidden), lm_head)


def _modules(config: ModelConfig, index: int) -> dict[str, list[tuple[str, int]]]:
    """Of each matrix of a layer: the checkpoint's modules that are its rows, and how many each has."""
    prefix = f"model.layers.{index}"
    rows = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.num_kv_heads * config.head_dim)
    attention = {
        "qkv": [(f"{prefix}.self_attn.{part}_proj", count) for part, count in zip("qkv", rows, strict=True)],
        "o": [(f"{prefix}.self_attn.o_proj", config.hidden_size)],
    }
    if config.has_experts(index):
        return attention
    return attention | {
        "gate_up": [(f"{prefix}.mlp.{part}_proj", config.intermediate_size) for part in ("gate", "up")],
        "down": [(f"{prefix}.mlp.down_proj", config.hidden_size)],
    }


def _targets(weights: DecoderWeights, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint of 16 or 32 bits by its name there, and the view that it fills."""
    yield "model.embed_tokens.weight", weights.embed
    yield "model.norm.weight", weights.norm
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        norms = {
            "input_layernorm": layer.input_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
            "post_attention_layernorm": layer.post_norm,
        }
        for name, norm in norms.items():
            if norm is not None:
                yield f"{prefix}.{name}.weight", norm
        for field, modules in _modules(config, index).items():
            linear = layer.linears()[field]
            sizes = [count for _, count in modules]
            for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
                if tensor is not None:
                    yield from zip((f"{name}.{kind}" for name, _ in modules), tensor.split(sizes), strict=True)
        if isinstance(layer.mlp, MixtureMLP):
            yield f"{prefix}.mlp.gate.weight", layer.mlp.router
            for expert, (gate_up, down) in enumerate(zip(layer.mlp.gate_up, layer.mlp.down, strict=True)):
                gate, up = gate_up.chunk(2)
                for part, tensor in (("gate", gate), ("up", up), ("down", down)):
                    yield f"{prefix}.mlp.experts.{expert}.{part}_proj.weight", tensor
