"""A load of drawn lengths and arrivals as a trace. No prompt shares anything with another."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from ...protocol.errors import ConfigError
from ...simulator.trace import BLOCK_SIZE, Trace, TraceRequest
from ..load.arrivals import unit_arrivals
from ..load.lengths import Lengths

NUM_REQUESTS = 2_000
LONGEST = 131_072


def synthetic_trace(rate: float, input_len: str, output_len: str, process: str, burstiness: float, seed: int) -> Trace:
    """rate: requests a second. Raises ConfigError for lengths or arrivals that cannot be read."""
    if rate <= 0:
        raise ConfigError("a synthetic load needs its requests a second; give --rate")
    rng = np.random.default_rng((seed, 0x5))
    inputs = Lengths.parse(input_len).draw(NUM_REQUESTS, rng, LONGEST).tolist()
    outputs = Lengths.parse(output_len).draw(NUM_REQUESTS, rng, LONGEST).tolist()
    arrivals = (unit_arrivals(process, NUM_REQUESTS, seed, burstiness) / rate).tolist()
    fresh = itertools.count(1)
    requests = tuple(
        TraceRequest(arrival_s, num_input, num_output, tuple(itertools.islice(fresh, -(-num_input // BLOCK_SIZE))))
        for arrival_s, num_input, num_output in zip(arrivals, inputs, outputs, strict=True)
    )
    name = f"{process} arrivals, {input_len} in, {output_len} out"
    return Trace(name, hashlib.sha256(repr(requests).encode()).hexdigest(), requests)
