"""The table of RoPE's cosines and sines: fp32 [num_positions, head_dim], cosines in the first half, sines in the second."""

from __future__ import annotations

import math

import torch

from .model_config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """Rotation angles position · theta^(-2i/head_dim), under the config's scaling."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.int64).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


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
