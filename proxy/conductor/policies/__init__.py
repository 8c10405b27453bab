"""Policies by name: how the Conductor selects among the candidates."""

from __future__ import annotations

import random

from ..placement import Slo
from ..predictors.timing import Predictors
from .adaptive import Adaptive
from .base import Policy, PolicySettings, cached_blocks, selected_blocks
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
    "create_policy",
    "policy_type",
    "selected_blocks",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (RandomChoice, RoundRobin, LeastLoaded, CacheAware, KvcacheCentric, Adaptive)
}


def policy_type(name: str) -> type[Policy]:
    """Raises ValueError for a name not in POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def create_policy(
    name: str,
    rng: random.Random,
    predictors: Predictors | None = None,
    *,
    slo: Slo | None = None,
    balancing_threshold: float = 1.0,
    local_prefill: bool = True,
) -> Policy:
    """rng: what `random` draws from. predictors, slo and balancing_threshold: of those that predict; None: a guess that learns, no SLO.
    local_prefill: workers that decode may compute prompts, too.

    Raises ValueError for a name not in POLICIES.
    """
    return policy_type(name).create(PolicySettings(rng, predictors or Predictors.guess(), slo or Slo(), balancing_threshold, local_prefill))
