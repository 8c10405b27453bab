"""The table of RoPE's cosines and sines: fp32 [num_positions, head_dim], cosines in the first half, sines in the second."""

from __future__ import annotations

import math

import torch

from .model_config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """Rotation angles position · theta^(-2i/head_dim), under the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is not None:
        frequencies = _yarn(frequencies, scaling, config) if scaling.kind == "yarn" else _scaled(frequencies, scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.int64).float(), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return (table if scaling is None else table * scaling.attention_factor).to(device)


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    """Peng et al., 2023, arXiv:2309.00071, "NTK-by-parts"."""

    def index_of(num_turns: float) -> float:
        """Of the frequency, as a fraction, that turns so many times in the original length."""
        ratio = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    steps = torch.arange(len(frequencies), dtype=torch.float32) - first
    divided = (steps / (last - first if last > first else 0.001)).clamp(0, 1)  # how far each frequency is divided by factor
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """ "llama3" as in Llama 3.1's reference code (meta-llama/llama-models, apply_scaling)."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    longest_kept = original / scaling.high_freq_factor
    shortest_scaled = original / scaling.low_freq_factor
    blend = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelengths > shortest_scaled, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, scaled)
