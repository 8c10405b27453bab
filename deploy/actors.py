"""The processes of a cluster as Ray actors: each has start() -> address, run() (ends when stopped), stop().

They get the cluster's token as an argument: Ray carries it behind its own token, and it stands in no environment and on no command line.

The supervisor learns of a death from run()'s object reference, which Ray fails the moment the process is gone.
Each actor imports its own server when it is made: a store's process needs no torch, a worker's no HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..protocol.config import ModelOptions, ProxyConfig, StoreConfig
from ..protocol.credentials import Credentials
from ..protocol.load_progress import Numbered
from ..protocol.log_context import FORMAT, NameRequest
from ..protocol.membership import stay_joined
from ..protocol.schema import KVSchema
from ..protocol.tasks import Tasks, beside
from ..protocol.tls import Tls
from ..protocol.v1 import control_pb2


def configure_logging() -> None:
    """Called once in each process, when it starts. Logs go to standard error, which Ray keeps in its session's logs folder."""
    handler = logging.StreamHandler()
    handler.addFilter(NameRequest())
    logging.basicConfig(level=logging.INFO, format=FORMAT, handlers=[handler])


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What modules make stays as long as the process. The garbage collector waits while they are imported and looks at none of it later.

    Its rounds through all of that would take a fifth of the time of a worker's imports, and 0.1 s now and then while it serves.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class ProxyActor:
    def __init__(
        self, *, config: ProxyConfig, options: ModelOptions, model_folder: str, schema: KVSchema, credentials: Credentials
    ) -> None:
        with lasting_imports():
            from ..proxy.server import ProxyServer

        configure_logging()
        self._server = ProxyServer(config=config, options=options, model_folder=Path(model_folder), schema=schema, credentials=credentials)
        self._stopped = asyncio.Event()

    async def start(self) -> tuple[str, ...]:
        """Addresses: HTTP, gRPC, control, metrics."""
        endpoints = await self._server.start()
        self._server.warm_up()
        return tuple(endpoints)

    async def run(self) -> None:
        await self._stopped.wait()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        self._stopped.set()

    async def renew(self, tls: Tls) -> None:
        """New certificates, for new connections."""
        await _renew(self._server.credentials, tls)


class StoreActor:
    """The node's KV store, as a member of the cluster. start() returns once the proxy knows it."""

    def __init__(
        self,
        *,
        store_id: str,
        node_id: str,
        host: str,
        port: int,
        proxy_address: str,
        config: StoreConfig,
        schema: KVSchema,
        max_model_len: int,
        model_name: str,
        credentials: Credentials,
    ) -> None:
        with lasting_imports():
            from ..kvstore.server import StoreServer

        configure_logging()
        self._server = StoreServer(
            config, node_id=node_id, store_id=store_id, schema=schema, max_model_len=max_model_len, credentials=credentials
        )
        self._credentials = credentials
        self._host, self._port, self._proxy_address = host, port, proxy_address
        self._model_name = model_name
        self._info = control_pb2.MemberInfo(
            id=store_id, incarnation=uuid.uuid4().hex, role=control_pb2.ROLE_STORE, node_id=node_id, store_id=store_id, pid=os.getpid()
        )
        self._info.kv_capacity_tokens = config.arena_bytes // schema.block_bytes * schema.block_size
        self._stopped = asyncio.Event()
        self._tasks = Tasks(store_id)
        self._refusal: Exception | None = None

    async def start(self) -> str:
        address = await self._server.start(self._host, self._port)
        self._info.address = self._info.store_address = address
        self._info.kv_capacity_tokens = self._server.capacity_tokens
        self._info.metrics_address = self._server.serve_metrics(self._host, self._model_name)
        joined = asyncio.Event()
        joining = stay_joined(
            self._proxy_address,
            self._info,
            self._load,
            joined.set,
            on_left=self._server.proxy_left,
            credentials=self._credentials,
            on_stores=self._server.know_stores,
        )
        self._tasks.spawn(joining, "its membership", self._end)
        async with beside(joined.wait()) as accepted, beside(self.run()) as ended:
            await asyncio.wait((accepted, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await ended
        return address

    async def run(self) -> None:
        """Returns when stopped; raises what the proxy refused it for."""
        await self._stopped.wait()
        if self._refusal is not None:
            raise self._refusal

    async def stop(self, grace_s: float) -> None:
        await self._tasks.close()
        await self._server.stop(grace_s)
        self._stopped.set()

    async def renew(self, tls: Tls) -> None:
        """New certificates, for new connections."""
        await _renew(self._credentials, tls)

    def _end(self, refusal: Exception) -> None:
        self._refusal = refusal
        self._stopped.set()

    def _load(self) -> control_pb2.MemberLoad:
        load = self._server.load()
        return control_pb2.MemberLoad(
            num_running=load.num_leases,
            kv_usage_ratio=load.usage_ratio,
            kv_leased_ratio=load.leased_ratio,
            ssd_bytes=load.num_bytes_ssd,
            ssd_used_bytes=load.num_bytes_ssd_used,
        )


class WorkerActor:
    """A worker in any role. kwargs: make_worker's."""

    def __init__(self, **kwargs: Any) -> None:
        with lasting_imports():
            from .worker import make_worker

        configure_logging()
        self._worker = make_worker(**kwargs)
        self._life = self._worker.life

    async def start(self) -> str:
        """Returns the gRPC address once the worker takes requests and the proxy knows it."""
        address = await self._worker.start()
        await self._life.until_joined()
        return address

    async def progress(self, seen: int) -> Numbered | None:
        """How far start() has come, as soon as there is news after number `seen`. None once the start is over."""
        return await self._life.progress.next(seen)

    async def run(self) -> None:
        """Returns when the worker is stopped. Raises what broke it."""
        await self._worker.serve_until_stopped()

    async def stop(self, grace_s: float) -> None:
        await self._worker.stop(grace_s)

    async def renew(self, tls: Tls) -> None:
        """New certificates, for new connections."""
        await _renew(self._life.worker_address.credentials, tls)


async def _renew(credentials: Credentials | None, tls: Tls) -> None:
    assert credentials is not None, "members of a cluster have some"
    await asyncio.to_thread(credentials.renew, tls)


def remote(actor_class: type, *, node_id: str, num_gpus: float = 0.0) -> Any:
    """The actor class for Ray, pinned to a node. The supervisor restarts it and not Ray, because a new process gets new arguments."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "max_concurrency": 16,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    return ray.remote(**options)(actor_class)
