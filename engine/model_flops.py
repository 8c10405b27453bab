"""What a model's steps cost in floating-point operations, by its shape, and what devices can do. No torch.

A multiply and an add are two operations. Only what the model needs counts: padding, and what is computed twice, do not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from .model_config import ModelConfig
from .sequence import StepChunk

PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Dense 16-bit operations a second by the makers' data sheets; the first name that the device's name holds."""


class StepWork(NamedTuple):
    """What one half had in a step."""

    num_tokens: int
    num_sequences: int
    num_pairs: int  # of a token and one that it attends to
    num_logits: int  # tokens whose successor was sampled

    @classmethod
    def of(cls, chunks: Collection[StepChunk], num_logits: int) -> StepWork:
        num_tokens = num_pairs = 0
        for _, start, length in chunks:
            num_tokens += length
            num_pairs += length * start + length * (length + 1) // 2
        return cls(num_tokens, len(chunks), num_pairs, num_logits)


@dataclass(frozen=True, slots=True)
class ModelFlops:
    per_token: float  # every layer's matrices
    per_logits: float  # the head, for a token whose successor is sampled
    per_pair: float  # attention of one token to one token, all layers

    @classmethod
    def of_model(cls, config: ModelConfig) -> ModelFlops:
        """Of experts, those that a token is given."""
        return cls(
            per_token=2.0 * _num_in_layers(config, config.mixture.num_experts_per_token if config.mixture else 0),
            per_logits=2.0 * config.hidden_size * config.vocab_size,
            per_pair=4.0 * config.num_layers * config.num_heads * config.head_dim,
        )

    def of_step(self, work: StepWork) -> float:
        """A sliding window is not taken off the context."""
        return work.num_tokens * self.per_token + work.num_logits * self.per_logits + work.num_pairs * self.per_pair


def peak_flops(device_name: str, dtype: str) -> float | None:
    """None where the device is not listed, or where the type is not a 16-bit one."""
    if dtype not in ("float16", "bfloat16"):
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def num_parameters(config: ModelConfig) -> int:
    """Of the matrices, every expert's included; norms and biases are left out."""
    embeddings = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    return _num_in_layers(config, config.mixture.num_experts if config.mixture else 0) + embeddings


def _num_in_layers(config: ModelConfig, num_experts: int) -> int:
    """Numbers in the layers' matrices, with so many experts in a mixture."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (q_size + 2 * kv_size) + q_size * config.hidden_size
    dense, mixture = 3 * config.hidden_size * config.intermediate_size, config.mixture
    if mixture is None:
        return config.num_layers * (attention + dense)
    experts = config.hidden_size * (mixture.num_experts + 3 * mixture.intermediate_size * num_experts)  # the router reads all of them
    num_mixtures = len(mixture.layers)
    return config.num_layers * attention + (config.num_layers - num_mixtures) * dense + num_mixtures * experts
