"""The demo's own check fails when KV bytes are altered on their way. Right answers on a sound cluster: test_one_node.py."""

from __future__ import annotations

import io
from types import ModuleType

import pytest
from rich.console import Console

from halfmoon.deploy.actors import WorkerActor
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.demo import converse
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.errors import HandoffCorrupt

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

CONFIG = ClusterConfig(
    store=StoreConfig(arena_bytes=256 * 2**20), proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0)
)


def flipping_actor(worker_views: ModuleType) -> type[WorkerActor]:
    """A worker whose prefill half pushes what it did not take the checksum of. Ray's processes know no test module: all goes by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(worker_views)

    class FlippingActor(WorkerActor):
        async def start(self) -> str:
            address = await super().start()
            if self._worker.role == "prefill":
                worker_views.flip_pushed_bytes(self._worker.stores.own.client)
            return address

    return FlippingActor


async def test_altered_kv_bytes_make_the_demo_fail(
    ray_nodes: list[RayNode], worker_views: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfmoon.deploy.supervisor.WorkerActor", flipping_actor(worker_views))
    async with running_cluster(CONFIG, ray_nodes) as supervisor:
        with pytest.raises(HandoffCorrupt, match=r"checksum|match"):
            await converse(supervisor.grpc_address, Console(file=io.StringIO()))
