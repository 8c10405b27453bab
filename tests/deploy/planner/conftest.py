"""A machine with round numbers."""

from __future__ import annotations

import pytest

from halfmoon.proxy.conductor.predictors import CostModel


@pytest.fixture(scope="session")
def small_cost() -> CostModel:
    """1 ms a prefill token; a step of 10 ms and 1 ms a sequence."""
    return CostModel(
        name="small", source="measured: nowhere", per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.01,
        per_sequence_s=1e-3, per_kv_token_s=0.0, kv_bytes_per_token=1000, num_layers=1, kv_capacity_tokens=16384, cache_tokens=64 * 512,
        link_bytes_per_s=1e9,
    )  # fmt: skip
