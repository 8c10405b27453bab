"""Policies by name: how the Conductor chooses among the candidates.

random · round_robin · least_loaded · cache_aware · kvcache_centric · adaptive
"""

from __future__ import annotations

import random

from ..placement import Slo
from ..predictors.timing import Predictors
from .adaptive import Adaptive
from .base import Policy, cached_blocks, choice_blocks
from .cache_aware import CacheAware
from .kvcache_centric import KvcacheCentric
from .least_loaded import LeastLoaded
from .random_choice import RandomChoice
from .round_robin import RoundRobin

__all__ = [
    "POLICIES",
    "Adaptive",
    "CacheAware",
    "KvcacheCentric",
    "LeastLoaded",
    "Policy",
    "RandomChoice",
    "RoundRobin",
    "cached_blocks",
    "choice_blocks",
    "create_policy",
]

POLICIES = ("random", "round_robin", "least_loaded", "cache_aware", "kvcache_centric", "adaptive")


def create_policy(
    name: str, rng: random.Random, predictors: Predictors | None = None, *, slo: Slo | None = None, balancing_threshold: float = 1.0
) -> Policy:
    """rng: what `random` draws from. predictors, slo and balancing_threshold: of those that predict; None: a guess that learns, no SLO.

    Raises ValueError for a name not in POLICIES.
    """
    if name == "random":
        return RandomChoice(rng)
    if name == "round_robin":
        return RoundRobin()
    if name == "least_loaded":
        return LeastLoaded()
    if name == "cache_aware":
        return CacheAware()
    if name == "kvcache_centric":
        return KvcacheCentric(predictors or Predictors.guess(), balancing_threshold)
    if name == "adaptive":
        return Adaptive(predictors or Predictors.guess(), slo or Slo())
    raise ValueError(f"no policy {name!r}; choose one of {', '.join(POLICIES)}")
