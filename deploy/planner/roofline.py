"""A cost model that nobody measured: a shape's operations and bytes over a GPU's peaks, as far as a measured model reached them.

products, attention    operations / (peak · what the measured model reached of it · TP)     + all-reduces of the tokens, twice a layer
weights, KV            bytes / (bandwidth · what it reached · TP)                           + the all-reduces' latency
"""

from __future__ import annotations

from typing import NamedTuple

from ...protocol.errors import ConfigError
from ...proxy.conductor.predictors.cost_model import CostModel
from .gpus import Gpu
from .model_shape import BYTES, ModelShape

MEMORY_SHARE = 0.9  # for weights and KV, as engine/engine.py takes it
NVLINK_SHARE = 0.7  # of its peak, in large all-reduces; assumed
ALL_REDUCE_S = 10e-6  # of a small one among GPUs of one host; as vLLM's authors published for 0.5 MB on four
ARENA_BYTES = 40 * 2**30  # of the host's memory a GPU, for the node's store; what the 8B was measured with
LEAST_KV_TOKENS = 16_384  # less room than that serves nobody


class Efficiency(NamedTuple):
    """Shares of a GPU's peaks."""

    products: float
    attention: float
    weights: float  # of the memory's bandwidth
    kv: float
    host: float  # of the link to the host's memory
    sequence: float  # seconds of a sequence in a decode step, by those of its products
    fixed: float  # seconds of any chunk, by those of a read of the weights
    request_s: float
    overlap: float

    @classmethod
    def reached(cls, cost: CostModel, shape: ModelShape, gpu: Gpu) -> Efficiency:
        """By a measured cost model of one GPU."""
        flops, bandwidth = shape.flops, gpu.bytes_per_s
        return cls(
            products=flops.per_token / cost.per_token_s / gpu.peak_flops,
            attention=flops.per_pair / cost.per_token_prefix_s / gpu.peak_flops,
            weights=shape.read_bytes / cost.step_s / bandwidth,
            kv=shape.kv_bytes_per_token / cost.per_kv_token_s / bandwidth,
            host=cost.link_bytes_per_s / gpu.host_bytes_per_s,
            sequence=cost.per_sequence_s / cost.per_token_s,
            fixed=cost.prefill_s / cost.step_s,
            request_s=cost.request_s,
            overlap=cost.overlap,
        )

    @property
    def text(self) -> str:
        parts = ("products", "attention", "weights", "kv")
        return ", ".join(f"{getattr(self, name):.0%} of peak in {name}" for name in parts)


def mean(found: list[Efficiency]) -> Efficiency:
    return Efficiency(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def derive(shape: ModelShape, gpu: Gpu, tp: int, reached: Efficiency, name: str, source: str) -> CostModel:
    """Raises ConfigError where the weights leave too little room for KV, or where heads can't be divided by tp."""
    if shape.num_kv_heads % tp:
        raise ConfigError(f"--tp {tp}: {shape.name} has {shape.num_kv_heads} KV heads, which {tp} GPUs can't share evenly")
    kv_bytes = shape.kv_bytes_per_token
    kv_capacity_tokens = int((MEMORY_SHARE * gpu.memory_bytes * tp - shape.weight_bytes) / kv_bytes)
    if kv_capacity_tokens < LEAST_KV_TOKENS:
        raise ConfigError(
            f"{shape.name} does not fit on {tp} x {gpu.title}: of {MEMORY_SHARE * gpu.memory_bytes * tp / 1e9:.0f} GB its weights of "
            f"{shape.weight_bytes / 1e9:.0f} GB leave pages for {max(kv_capacity_tokens, 0)} tokens; give a larger --tp"
        )
    # two all-reduces a layer; a ring moves each token's row 2 (tp - 1) / tp times
    moved_bytes = 2 * shape.num_layers * 2 * (tp - 1) / tp * shape.hidden_size * BYTES
    reduce_s = moved_bytes / (gpu.nvlink_bytes_per_s * NVLINK_SHARE)
    latency_s = 2 * shape.num_layers * ALL_REDUCE_S if tp > 1 else 0.0
    products_s = shape.flops.per_token / (gpu.peak_flops * reached.products * tp)
    pair_s = shape.flops.per_pair / (gpu.peak_flops * reached.attention * tp)
    read_s = shape.read_bytes / (gpu.bytes_per_s * reached.weights * tp)
    return CostModel(
        name=name, source=source,
        prefill_s=reached.fixed * read_s + latency_s, per_token_s=products_s + reduce_s,
        per_token_prefix_s=pair_s, per_token_squared_s=pair_s / 2,
        step_s=read_s + latency_s, per_sequence_s=reached.sequence * products_s + reduce_s,
        per_kv_token_s=kv_bytes / (gpu.bytes_per_s * reached.kv * tp),
        kv_bytes_per_token=kv_bytes, num_layers=shape.num_layers, kv_capacity_tokens=kv_capacity_tokens,
        cache_tokens=ARENA_BYTES * tp // kv_bytes, link_bytes_per_s=gpu.host_bytes_per_s * reached.host * tp,
        own_load_bytes_per_s=gpu.host_bytes_per_s * reached.host * tp, request_s=reached.request_s, overlap=reached.overlap,
    )  # fmt: skip
