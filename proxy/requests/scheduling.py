"""Builds the Conductor and its parts from the configuration."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

from ...protocol.config import ProxyConfig
from ..conductor.admission import create_admission
from ..conductor.conductor import Conductor
from ..conductor.load_tracker import LoadTracker
from ..conductor.placement import Slo
from ..conductor.policies import create_policy
from ..conductor.predictors import CostModel, Predictors
from ..members.cluster import Cluster
from ..members.member import Member
from ..members.rebalancer import Rebalancer
from ..metrics import ProxyMetrics
from ..prefixes.index import PrefixIndex
from .learner import Learner
from .placer import Placer, QueueOrdering

PREFIX_LINK = "tcp"  # a prefix missing in the worker's own store comes from another node


def default_slo(config: ProxyConfig) -> Slo:
    return Slo(config.ttft_slo_s or math.inf, config.tpot_slo_s or math.inf)


def create_predictors(config: ProxyConfig, cluster: Cluster) -> Predictors:
    """Raises ConfigError for a cost model that cannot be read. The bytes of a token come from the cluster's own schema."""
    predictors = Predictors(CostModel.load(Path(config.cost_model))) if config.cost_model else Predictors.guess()
    predictors.transfer.default_link = PREFIX_LINK

    def measure_tokens(_: Member | None = None) -> None:
        if cluster.schema is not None:
            num_bytes = cluster.schema.block_bytes // cluster.schema.block_size
            predictors.model = dataclasses.replace(predictors.model, kv_bytes_per_token=max(num_bytes, 1))

    measure_tokens()
    cluster.on_join(measure_tokens)
    return predictors


def create_conductor(config: ProxyConfig, predictors: Predictors, rng: random.Random) -> Conductor:
    slo = default_slo(config)
    policy = create_policy(config.policy, rng, predictors, slo=slo, local_prefill=config.local_prefill != "never")
    return Conductor(policy, create_admission(config.admission, slo, predictors), predictors, local_prefill=config.local_prefill)


def create_rebalancer(config: ProxyConfig, cluster: Cluster, conductor: Conductor, metrics: ProxyMetrics) -> Rebalancer | None:
    """None where workers keep their roles. Else everyone is a candidate for everything, unless workers that decode may not prefill."""
    roles = conductor.policy.roles
    if roles is None or not config.rebalance_s or config.local_prefill == "always":
        return None
    cluster.one_pool = config.local_prefill == "fallback"
    return Rebalancer(cluster, roles, metrics.members, interval_s=config.rebalance_s)


def create_placer(
    config: ProxyConfig, cluster: Cluster, index: PrefixIndex, page_index: PrefixIndex, conductor: Conductor, learner: Learner
) -> Placer:
    ordering = QueueOrdering(config.order)
    return Placer(cluster, index, page_index, conductor, learner, LoadTracker(), ordering, profiled=bool(config.cost_model))
