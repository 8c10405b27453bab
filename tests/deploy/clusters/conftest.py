"""One Ray, and one real cluster for several files: real Ray actors, real gRPC, the demo model. And the independent reference."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import grpc.aio
import pytest
import pytest_asyncio
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from halfmoon.client import AsyncClient, Control
from halfmoon.deploy.actors import WorkerActor
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import LOOPBACK, RayNode, live_nodes, ray_environment, ray_session
from halfmoon.deploy.supervisor import Supervisor
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.metrics import STEP_TOKENS
from halfmoon.protocol.tls import read_pem
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc
from halfmoon.tests.deploy.tls_listeners import data_port

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster as RayCluster

NODE_OPTIONS = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_log_monitor": False}
NUM_MEMBERS = 5  # of the serving cluster


@pytest.fixture(scope="package")
def rays() -> Iterator[RayCluster]:
    """One Ray on this machine for all of the folder's tests: starting one takes longer than most of them."""
    with ray_environment():
        from ray.cluster_utils import Cluster

        rays = Cluster(initialize_head=True, head_node_args={**NODE_OPTIONS, "node_ip_address": LOOPBACK, "include_dashboard": False})
        try:
            yield rays
        finally:
            rays.shutdown()


@pytest.fixture(scope="package")
def ray_nodes(rays: RayCluster) -> Iterator[list[RayNode]]:
    """The node that the tests are on."""
    with ray_session(rays.address) as nodes:
        yield nodes


@pytest.fixture(scope="package")
def two_nodes(rays: RayCluster, ray_nodes: list[RayNode]) -> list[RayNode]:
    """The same Ray, from now on with another node."""
    rays.add_node(**NODE_OPTIONS, node_ip_address="127.0.0.3")
    return live_nodes()


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Reference:
    return Reference(model_folder)


class Reference:
    """Greedy tokens by transformers, fp32 on CPU."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, prompt: tuple[int, ...], num_tokens: int, draft: Sequence[int]) -> list[int]:
        """draft: an answer to check in one forward pass, which tells whether each of its tokens is transformers' choice after those
        before it. Where one is not, transformers' own generate gives the answer, in a pass a token."""
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *draft]])
            logits = self._model(ids, use_cache=False, logits_to_keep=len(draft) + 1).logits[0, :-1]
            if len(draft) == num_tokens and logits.argmax(-1).tolist() == list(draft):
                return list(draft)
            out = self._model.generate(
                ids[:, : len(prompt)],
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                eos_token_id=None,
            )
        return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., tuple[int, ...]]:
    """(length, seed=0) -> token ids, the same every time."""
    return _prompt_of


@pytest.fixture(scope="session")
def cluster_type() -> type[Cluster]:
    return Cluster


@pytest_asyncio.fixture(scope="package")
async def serving_cluster(ray_nodes: list[RayNode], model_folder: Path, worker_views: ModuleType) -> AsyncIterator[Cluster]:
    """Two prefill and two decode workers, taken in turn, and one store. KV moves through shared memory."""
    config = ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, policy="round_robin"),
        prefill=PrefillConfig(num_workers=2, max_tokens_per_step=128),
        decode=DecodeConfig(num_workers=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfmoon.deploy.supervisor.WorkerActor", flipping_actor(worker_views))
        async with running_cluster(config, ray_nodes) as supervisor, Cluster.open(supervisor) as opened:
            yield opened


@pytest_asyncio.fixture
async def cluster(serving_cluster: Cluster) -> AsyncIterator[Cluster]:
    """The serving cluster, complete and at rest when each test begins and ends. Files that want another have one of their own."""
    yield serving_cluster
    await serving_cluster.all_joined(NUM_MEMBERS)
    await serving_cluster.at_rest()


def flipping_actor(worker_views: ModuleType) -> type[WorkerActor]:
    """A worker that can be told to push what it did not take the checksum of. Ray's processes know no test module: all goes by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(worker_views)

    class FlippingActor(WorkerActor):
        async def flip_pushed_bytes(self) -> None:
            """Until its store is another process."""
            worker_views.flip_pushed_bytes(self._worker.stores.own.client)

    return FlippingActor


def _prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(10, 1000, (length,), generator=generator).tolist())


@dataclass
class Cluster:
    """A running cluster and what tests look at."""

    supervisor: Supervisor
    client: AsyncClient

    certs: str  # folder of its certificates; "": it has no TLS
    api_key: str  # of the client; "": the cluster has no keys

    @classmethod
    @asynccontextmanager
    async def open(cls, supervisor: Supervisor, certs: str = "", api_key: str = "") -> AsyncIterator[Cluster]:
        control = Control(supervisor.control_address, supervisor.credentials.token, certs)
        authority = read_pem(Path(certs, "authority.pem")) if certs else None
        async with AsyncClient(supervisor.grpc_address, api_key=api_key, authority=authority, control=control) as client:
            yield cls(supervisor, client, certs, api_key)

    @property
    def control(self) -> Control:
        return Control(self.supervisor.control_address, self.supervisor.credentials.token, self.certs)

    async def status(self) -> control_pb2.StatusReply:
        async with open_channel(self.supervisor.control_address, self.supervisor.credentials) as channel:
            return await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest())

    async def store_stats(self) -> list[kvstore_pb2.StatsReply]:
        found = []
        for member in (await self.status()).members:
            if member.info.role == control_pb2.ROLE_STORE:
                async with open_channel(member.info.address, self.supervisor.credentials) as channel:
                    found.append(await kvstore_pb2_grpc.KVStoreStub(channel).Stats(kvstore_pb2.StatsRequest()))
        return found

    async def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        result = await self.client.generate(token_ids=list(prompt), max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return list(result.token_ids)

    async def members(self, role: int) -> list[control_pb2.MemberInfo]:
        return [member.info for member in (await self.status()).members if member.info.role == role]

    async def attacked(self, **more: object) -> dict[str, list[str]]:
        """What attacker.py gets from this cluster, by attempt. more: of what it is told."""
        members = [member.info for member in (await self.status()).members]
        workers = [info for info in members if info.role != control_pb2.ROLE_STORE]
        stores = [info.address for info in members if info.role == control_pb2.ROLE_STORE]
        ports = [await data_port(address, self.supervisor.credentials, workers[0].schema) for address in stores]
        target = {
            "grpc": self.supervisor.grpc_address,
            "http": self.supervisor.http_address,
            "control": self.supervisor.control_address,
            "workers": [info.address for info in workers],
            "stores": stores,
            "data": [f"{address.rpartition(':')[0]}:{port}" for address, port in zip(stores, ports, strict=True)],
            "schema": workers[0].schema.SerializeToString().hex(),
        }
        command = [sys.executable, str(Path(__file__).with_name("attacker.py")), json.dumps(target | more)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return json.loads(output)

    async def num_decoded(self) -> float:
        """Tokens that the decode workers' steps have computed since they started."""
        total = 0.0
        for info in await self.members(control_pb2.ROLE_DECODE):
            page = await asyncio.to_thread(urllib.request.urlopen, f"http://{info.metrics_address}/metrics")
            samples = [one for family in text_string_to_metric_families(page.read().decode()) for one in family.samples]
            total += sum(one.value for one in samples if one.name == f"{STEP_TOKENS.name}_total")
        return total

    async def kill(self, member_id: str) -> None:
        info = next(member.info for member in (await self.status()).members if member.info.id == member_id)
        os.kill(info.pid, signal.SIGKILL)

    async def restart(self, member_id: str) -> None:
        """Kills it, and returns once its next process has joined."""
        (killed,) = [member.info for member in (await self.status()).members if member.info.id == member_id]
        os.kill(killed.pid, signal.SIGKILL)
        async with asyncio.timeout(300):
            while True:
                now = {member.info.incarnation for member in (await self.status()).members if member.info.id == member_id}
                if now and killed.incarnation not in now:
                    return
                await asyncio.sleep(0.1)

    async def decoding_worker(self, request_id: str) -> str:
        """Whose tokens the request gets."""
        (explained,) = await self.client.explain(request_id)
        return next(candidate.id for candidate in explained.attempts[-1].decode if candidate.chosen)

    async def restart_proxy(self, num_members: int) -> None:
        """Kills it, and returns once another process has taken its place and knows the members again."""
        import ray

        proxy = next(member for member in self.supervisor.members if member.id == "proxy")
        killed = proxy.actor
        ray.kill(killed, no_restart=True)
        async with asyncio.timeout(300):
            while True:
                try:
                    if proxy.actor is not killed:
                        await self.all_joined(num_members)
                        return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                await asyncio.sleep(0.1)

    async def all_joined(self, num_members: int, timeout_s: float = 300.0) -> None:
        async with asyncio.timeout(timeout_s):
            while len((await self.status()).members) < num_members:
                await asyncio.sleep(0.2)

    async def at_rest(self, within_s: float = 60.0) -> None:
        """Nothing leased, no hand-off, no page in use, no request known: within the time given, and the slots add up."""
        start, left = time.monotonic(), "nothing looked at"
        while time.monotonic() - start < within_s:
            left = await self._not_at_rest()
            if not left:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{within_s} s later: {left}")

    async def _not_at_rest(self) -> str:
        status, stats = await self.status(), await self.store_stats()
        for found in stats:
            total = found.num_bytes_leased + found.num_bytes_cached + found.num_bytes_free
            assert total == found.num_bytes_arena, (
                f"{found.store_id}: leased + cached + free = {total}, the arena has {found.num_bytes_arena}"
            )
            if found.num_bytes_leased or found.num_handoffs or found.num_leases:
                return f"{found.store_id} holds {found.num_leases} leases, {found.num_handoffs} hand-offs"
        if status.num_queued or status.num_running:
            return f"the proxy counts {status.num_queued} queued and {status.num_running} running"
        for member in status.members:
            if member.info.role != control_pb2.ROLE_STORE and (
                member.load.kv_usage_ratio or member.load.num_running or member.load.num_waiting
            ):
                return f"{member.info.id}: {member.load}"
        return ""
