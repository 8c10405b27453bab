"""What each kind of process registers, made without the process. `from halfmoon.tests.deploy.registries import …`"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from halfmoon.decode_worker.metrics import DecodeMetrics
from halfmoon.engine.model_flops import ModelFlops
from halfmoon.engine.worker_metrics import WorkerMetrics
from halfmoon.kvstore.metrics import StoreMetrics
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import kvstore_pb2
from halfmoon.proxy.conductor.predictors import Predictors
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.proxy.prefixes.promoter import Promoter
from halfmoon.proxy.prefixes.replicator import Replicator
from halfmoon.proxy.requests.learner import Learner


def proxy_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    cluster = Cluster(ProxyMetrics(registry))
    Replicator(cluster, PrefixIndex(), registry, replicate="never")
    Promoter(cluster, Learner(Predictors.guess(), ProxyMetrics(CollectorRegistry())), registry)
    return registry


def worker_registry() -> CollectorRegistry:
    worker = WorkerMetrics(ModelFlops(1.0, 1.0, 1.0))
    schema = KVSchema(model_fingerprint="test", dtype="float16", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
    facts: Any = SimpleNamespace(num_pages=2, page_size=4, weight_bytes=1, schema=schema, peak_flops=1e12)
    pages: Any = SimpleNamespace(usage_ratio=0.0)
    worker.watch_engine(facts, pages, lambda: 0.0)
    DecodeMetrics(worker.registry)
    return worker.registry


def store_registry() -> CollectorRegistry:
    return StoreMetrics(kvstore_pb2.StatsReply).registry
