"""The demo's own check: right answers on a sound cluster, and a failure when KV bytes are altered on their way."""

from __future__ import annotations

import io
from types import ModuleType

import pytest
from rich.console import Console

from halfmoon.deploy.actors import WorkerActor
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.demo import TURNS, converse
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.config import ClusterConfig, ProxyConfig
from halfmoon.protocol.errors import HandoffCorrupt

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

CONFIG = ClusterConfig(proxy=ProxyConfig(http_port=0, grpc_port=0))


async def test_the_demo_answers_right_and_its_second_turn_hits_the_cache(ray_nodes: list[RayNode]) -> None:
    shown = io.StringIO()
    async with running_cluster(CONFIG, ray_nodes) as supervisor:
        outcome = await converse(supervisor.grpc_address, Console(file=shown, width=200))
    assert outcome.num_right == len(TURNS), shown.getvalue()
    assert outcome.num_cached_tokens >= 128
    assert "4821" in shown.getvalue() and "time to first token" in shown.getvalue()


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
