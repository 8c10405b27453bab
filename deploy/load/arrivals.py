"""When requests come, at a mean of one a second. Divided by a rate, the same arrivals serve for every rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError

PROCESSES = ("poisson", "gamma", "constant")


def unit_arrivals(process: str, num_requests: int, seed: int, burstiness: float = 1.0) -> NDArray[np.float64]:
    """Rising times in seconds. [num_requests]

    Args:
        burstiness: shape of the gaps of `gamma`; their coefficient of variation is burstiness ** -0.5. 1 is Poisson, below 1
            requests come in bursts, far above 1 they come evenly.

    Raises ConfigError for an unknown process or a burstiness that is not above 0.
    """
    if burstiness <= 0:
        raise ConfigError(f"burstiness is {burstiness}; it must be above 0 (1 is Poisson, smaller is burstier)")
    rng = np.random.default_rng((seed, 0xA))
    if process == "poisson":
        gaps = rng.exponential(1.0, num_requests)
    elif process == "gamma":
        gaps = rng.gamma(burstiness, 1.0 / burstiness, num_requests)
    elif process == "constant":
        gaps = np.ones(num_requests)
    else:
        raise ConfigError(f"no arrival process {process!r}; choose of {', '.join(PROCESSES)}")
    return np.cumsum(gaps)
