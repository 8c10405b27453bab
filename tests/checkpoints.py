"""Tiny random checkpoints of every supported architecture and variant, written by transformers itself.

Loaded by the `checkpoint` fixture of tests/conftest.py, for transformers takes a while to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # wide, so that attention patterns are sharp and a wrong mask or position shows
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16}
# name -> (transformers' configuration class, what differs from COMMON)
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama2_mha": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3_gqa": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_tied": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "rope_yarn": (transformers.LlamaConfig, {"rope_parameters": YARN_ROPE, "max_position_embeddings": 256}),
    "rope_dynamic": (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama_biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral_window": (transformers.MistralConfig, {"sliding_window": 11}),
    "mistral_full": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2_window": (transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen25_tied": (transformers.Qwen2Config, {"tie_word_embeddings": True, "sliding_window": 13, "num_key_value_heads": 1}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 40, "tie_word_embeddings": True}),
    "qwen3_window": (
        transformers.Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "sparse_mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 29}),
    "sparse_qwen3_moe": (transformers.Qwen3MoeConfig, {**EXPERTS, "norm_topk_prob": True}),
    "sparse_qwen3_some_dense": (transformers.Qwen3MoeConfig, {**EXPERTS, "mlp_only_layers": [2], "tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: Any  # transformers' own, fp32, eager attention


class Checkpoints:
    """checkpoints(name, max_shard_size="1GB") -> Checkpoint, made once."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._made: dict[tuple[str, str], Checkpoint] = {}

    def __call__(self, name: str, max_shard_size: str = "1GB") -> Checkpoint:
        if (name, max_shard_size) not in self._made:
            config_type, changes = VARIANTS[name]
            torch.manual_seed(sorted(VARIANTS).index(name))
            config = config_type(**{**COMMON, **changes})
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
            folder = self._make_folder(name)
            with torch.no_grad():  # biases and norms begin as zeros and ones, which would hide that they are not read
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            self._made[name, max_shard_size] = Checkpoint(folder, model)
        return self._made[name, max_shard_size]
