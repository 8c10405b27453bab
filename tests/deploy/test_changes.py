"""Hosts that go, configurations that change, rolling restarts: the supervisor over processes that are played."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfmoon.deploy import supervisor as supervisor_module
from halfmoon.deploy.cluster import make_spec
from halfmoon.deploy.ray_session import RayNode
from halfmoon.deploy.supervisor import ProxyActor, Supervisor
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig
from halfmoon.protocol.errors import ConfigError
from halfmoon.tests.waiting import until


class Played:
    """Ray, as far as the supervisor uses it."""

    def __init__(self, nodes: list[RayNode]) -> None:
        self.nodes = nodes
        self.events: list[str] = []
        self.alive: dict[str, PlayedActor] = {}

    def remote(self, actor_class: type, *, node_id: str, num_gpus: float) -> Any:
        return SimpleNamespace(remote=lambda **arguments: PlayedActor(self, actor_class, node_id, arguments, num_gpus))

    def kill(self, actor: PlayedActor, no_restart: bool) -> None:
        actor.die()

    def lose(self, host: str) -> None:
        gone = {node.node_id for node in self.nodes if node.host == host}
        self.nodes = [node for node in self.nodes if node.host != host]
        for actor in [actor for actor in self.alive.values() if actor.node_id in gone]:
            actor.die()

    def on(self) -> dict[str, str]:
        return {member_id: actor.node_id for member_id, actor in sorted(self.alive.items())}


class PlayedActor:
    def __init__(self, ray: Played, actor_class: type, node_id: str, arguments: dict[str, Any], num_gpus: float) -> None:
        self.ray, self.node_id, self.arguments, self.actor_class = ray, node_id, arguments, actor_class
        self.num_gpus = num_gpus
        worker = arguments.get("worker_address")
        self.id = "proxy" if actor_class is ProxyActor else worker.worker_id if worker is not None else arguments["store_id"]
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.start = SimpleNamespace(remote=self._start)
        self.run = SimpleNamespace(remote=lambda: self.ended)
        self.stop = SimpleNamespace(remote=self._stop)
        self.progress = SimpleNamespace(remote=self._progress)

    async def _start(self) -> Any:
        self.ray.alive[self.id] = self
        self.ray.events.append(f"{self.id} starts")
        return ("h:1", "h:2", "h:3", "h:4") if self.id == "proxy" else f"{self.node_id}:{len(self.ray.events)}"

    async def _progress(self, seen: int) -> None:
        return None

    def _stop(self, grace_s: float) -> Any:
        self.ray.events.append(f"{self.id} stops")
        self.ray.alive.pop(self.id, None)
        if not self.ended.done():
            self.ended.set_result(None)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return SimpleNamespace(future=lambda: done)

    def die(self) -> None:
        from ray.exceptions import RayActorError

        if not self.ended.done():
            self.ray.alive.pop(self.id, None)
            self.ended.set_exception(RayActorError())


def hosts(count: int, num_gpus: float = 0.0) -> list[RayNode]:
    return [RayNode(f"n{i}", f"10.0.0.{i}", num_gpus) for i in range(count)]


def config(model_folder: Path, num_decode: int = 2, **decode: Any) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(path=str(model_folder)),
        proxy=ProxyConfig(host="0.0.0.0"),
        prefill=PrefillConfig(num_workers=1),
        decode=DecodeConfig(num_workers=num_decode, **decode),
    )


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch, asked: ClusterConfig, nodes: list[RayNode]) -> AsyncIterator[tuple[Supervisor, Played]]:
    import ray

    played = Played(nodes)
    monkeypatch.setattr(supervisor_module, "remote", played.remote)
    monkeypatch.setattr(supervisor_module, "NODES_EVERY_S", 0.01)
    monkeypatch.setattr(ray, "kill", played.kill)
    found = Supervisor(make_spec(asked, list(nodes)), find_nodes=lambda: list(played.nodes))
    try:
        await found.start()
        yield found, played
    finally:
        await found.stop()


async def test_workers_of_a_lost_host_move_to_the_host_with_the_fewest_and_get_a_store_there(monkeypatch, model_folder: Path) -> None:
    async with running(monkeypatch, config(model_folder), hosts(3)) as (_, ray):
        assert ray.on() == {
            "proxy": "n0",
            "prefill-0": "n0",
            "decode-0": "n2",
            "decode-1": "n1",
            "store-0": "n0",
            "store-1": "n1",
            "store-2": "n2",
        }
        ray.nodes.append(RayNode("n9", "10.0.0.9", 0.0))
        ray.lose("10.0.0.2")
        await until(lambda: "decode-0" in ray.alive)
        assert ray.on() == {
            "proxy": "n0",
            "prefill-0": "n0",
            "decode-0": "n9",
            "decode-1": "n1",
            "store-0": "n0",
            "store-1": "n1",
            "store-3": "n9",
        }
        assert ray.alive["decode-0"].arguments["worker_address"].store_address.startswith("n9:")


async def test_a_worker_that_needs_a_gpu_waits_for_a_host_that_has_one_free(monkeypatch, model_folder: Path) -> None:
    asked = config(model_folder)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, device="cuda"))
    async with running(monkeypatch, asked, hosts(3, num_gpus=1.0)) as (supervisor, ray):
        ray.lose("10.0.0.2")
        await until(lambda: "store-2" not in {member.id for member in supervisor.members})
        assert "decode-0" not in ray.alive
        ray.nodes.append(RayNode("n9", "10.0.0.9", 1.0))
        await until(lambda: "decode-0" in ray.alive)
        assert ray.on()["decode-0"] == "n9"


async def test_a_worker_of_several_gpus_waits_for_a_host_that_has_as_many_free(monkeypatch, model_folder: Path) -> None:
    asked = config(model_folder, tensor_parallel=2)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, device="cuda"))
    async with running(monkeypatch, asked, hosts(3, num_gpus=2.0)) as (supervisor, ray):
        assert (ray.alive["prefill-0"].num_gpus, ray.alive["decode-0"].num_gpus) == (1.0, 2.0)
        ray.lose("10.0.0.2")
        await until(lambda: "store-2" not in {member.id for member in supervisor.members})
        ray.nodes.append(RayNode("n8", "10.0.0.8", 1.0))
        ray.nodes.append(RayNode("n9", "10.0.0.9", 2.0))
        await until(lambda: "decode-0" in ray.alive)
        assert ray.on()["decode-0"] == "n9"


async def test_a_changed_configuration_starts_what_is_missing_and_stops_what_is_too_much(monkeypatch, model_folder: Path) -> None:
    async with running(monkeypatch, config(model_folder), hosts(3)) as (supervisor, ray):
        ray.nodes.append(RayNode("n9", "10.0.0.9", 0.0))
        assert await supervisor.apply(config(model_folder, 3)) == "decode-2 added"
        assert ray.on()["decode-2"] == "n9"
        assert await supervisor.apply(config(model_folder, 1)) == "decode-1 removed, decode-2 removed"
        assert [member for member in ray.on() if member.startswith("decode")] == ["decode-0"]
        assert await supervisor.apply(config(model_folder, 1)) == "nothing to change"


async def test_what_cannot_change_is_refused_and_nothing_is_touched(monkeypatch, model_folder: Path) -> None:
    async with running(monkeypatch, config(model_folder), hosts(3)) as (supervisor, ray):
        before = list(ray.events)
        asked = config(model_folder)
        with pytest.raises(ConfigError, match=r"proxy\.policy cannot change"):
            await supervisor.apply(dataclasses.replace(asked, proxy=dataclasses.replace(asked.proxy, policy="random")))
        with pytest.raises(ConfigError, match=r"decode\.tensor_parallel cannot change"):
            await supervisor.apply(dataclasses.replace(asked, decode=dataclasses.replace(asked.decode, tensor_parallel=2)))
        with pytest.raises(ConfigError, match="no worker would decode"):
            await supervisor.apply(config(model_folder, 0))
        assert ray.events == before


async def test_a_rolling_restart_goes_host_by_host_and_a_store_goes_while_nobody_uses_it(monkeypatch, model_folder: Path) -> None:
    async with running(monkeypatch, config(model_folder), hosts(3)) as (supervisor, ray):
        ray.events.clear()
        await supervisor.apply(config(model_folder, max_running=8))
        assert ray.events == [
            *("prefill-0 stops", "store-0 stops", "store-0 starts", "prefill-0 starts"),
            *("decode-0 stops", "store-2 stops", "store-2 starts", "decode-0 starts"),
            *("decode-1 stops", "store-1 stops", "store-1 starts", "decode-1 starts"),
        ]
        assert ray.alive["decode-0"].arguments["decode"].max_running == 8


async def test_where_one_host_decodes_its_workers_restart_one_at_a_time_and_its_store_stays(monkeypatch, model_folder: Path) -> None:
    async with running(monkeypatch, config(model_folder), hosts(1)) as (supervisor, ray):
        ray.events.clear()
        await supervisor.roll()
        workers = ("prefill-0", "decode-0", "decode-1")
        assert ray.events == [f"{worker} {what}" for worker in workers for what in ("stops", "starts")]
