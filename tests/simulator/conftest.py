"""Small clusters and traces for the simulator's tests."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.replay import Replay
from halfmoon.simulator.trace import TraceRequest


@pytest.fixture(scope="session")
def small_cost() -> CostModel:
    """Round numbers: 1 ms a prefill token, no squares; a step of 10 ms + 1 ms a sequence; 1 GB/s links, 1 KB a token."""
    return CostModel(
        name="small", per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.01, per_sequence_s=1e-3,
        per_kv_token_s=0.0,
        kv_bytes_per_token=1000, num_layers=1, kv_capacity_tokens=16384, cache_tokens=64 * 512, link_bytes_per_s=1e9,
    )  # fmt: skip


@pytest.fixture(scope="session")
def talk() -> Callable[..., Replay]:
    """A replay of `num` requests in sessions that grow turn by turn, as random as the seed says."""

    def make(num: int, seed: int, *, gap_s: float = 0.3, longest: int = 3000, output: int = 40) -> Replay:
        rng = random.Random(seed)
        sessions: list[list[int]] = [[0] for _ in range(max(num // 4, 1))]
        requests: list[TraceRequest] = []
        now, fresh = 0.0, 1
        for _ in range(num):
            now += rng.expovariate(1.0 / gap_s)
            blocks = rng.choice(sessions)
            for _ in range(rng.randint(0, 2)):
                if len(blocks) * 512 < longest:
                    blocks.append(fresh)
                    fresh += 1
            num_input = min((len(blocks) - 1) * 512 + rng.randint(1, 512), longest)
            requests.append(TraceRequest(now, num_input, rng.randint(1, output), (*blocks, 10**6 + fresh)))
            fresh += 1
        return Replay(requests, [])

    return make
