"""One store process's server: arena, Store, gRPC, metrics; start and stop.

StoreServer.start ─► arena in /dev/shm ─► Store ─► data connections on host:any ─► gRPC on host:port
           .stop  ─► drain ─► sessions end ─► gRPC stops ─► data connections end ─► arena removed
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

import grpc.aio

from ..protocol.channel import close_server, create_server
from ..protocol.config import StoreConfig
from ..protocol.credentials import Credentials, SocketTls
from ..protocol.exporter import Identity, ProcessMetrics, serve_metrics
from ..protocol.schema import KVSchema
from ..protocol.v1 import kvstore_pb2, kvstore_pb2_grpc
from .arena import Arena, remove_abandoned
from .arena_size import arena_size
from .lease_manager import Accounting
from .replication import Replication
from .service import KVStoreService
from .store import Store


class StoreLoad(NamedTuple):
    num_leases: int
    num_handoffs: int
    num_sessions: int
    usage_ratio: float  # of the arena: what is not free
    leased_ratio: float  # of the arena: what can't be evicted
    num_bytes_ssd: int  # 0: there is no SSD tier
    num_bytes_ssd_used: int


class StoreServer:
    def __init__(
        self,
        config: StoreConfig,
        *,
        node_id: str,
        store_id: str = "",
        schema: KVSchema | None = None,
        max_model_len: int = 0,
        credentials: Credentials | None = None,
    ) -> None:
        """node_id: clients that name the same node share the arena. store_id: empty for a random one. schema: None for the
        first client's. max_model_len: sizes the arena where the configuration does not. credentials: of the cluster, which it serves
        alone; None: a store without a cluster, for whoever reaches it."""
        self.store_id = store_id or f"store-{secrets.token_hex(6)}"
        self.address = ""
        self._config = config
        self._node_id = node_id
        self._schema = schema
        self._max_model_len = max_model_len
        self._credentials = credentials
        self._arena: Arena | None = None
        self._store: Store | None = None
        self._replication: Replication | None = None
        self._server: grpc.aio.Server | None = None
        self._stop_metrics: Callable[[], None] | None = None

    async def start(self, host: str, port: int = 0) -> str:
        """Returns "host:port". Raises ConfigError (no room for the arena, no block fits it), OSError (the port is taken)."""
        server, bound = create_server(host, port, credentials=self._credentials)
        arena: Arena | None = None
        store: Store | None = None
        try:
            # touching every page of a large arena takes a while
            arena = await asyncio.to_thread(self._make_arena)
            store = Store(self._config, arena, store_id=self.store_id, node_id=self._node_id, schema=self._schema)
            replication = Replication(store, self._credentials)
            kvstore_pb2_grpc.add_KVStoreServicer_to_server(KVStoreService(store, replication), server)
            store.data.start(host, SocketTls.of_server(self._credentials))
            await store.tiers.opened()
            await server.start()
        except BaseException:
            await close_server(server)
            if store is not None:
                await asyncio.to_thread(store.data.stop)
                await store.tiers.close()
            if arena is not None:
                arena.close()
            raise
        self._server, self._arena, self._store, self._replication = server, arena, store, replication
        self.address = f"{host}:{bound}"
        return self.address

    def _make_arena(self) -> Arena:
        remove_abandoned()  # before free memory is looked at
        return Arena(arena_size(self._config, self._schema, self._max_model_len).num_bytes)

    def serve_metrics(self, host: str, model_name: str) -> str:
        """Serves /metrics on a free port of host; returns "host:port". model_name: whose KV it holds, for the series' labels."""
        identity = Identity(self.store_id, "store", model_name)
        metrics = ProcessMetrics(self._running().metrics.registry, lambda: identity)
        address, self._stop_metrics = serve_metrics(metrics, host, credentials=self._credentials)
        return address

    async def stop(self, grace_s: float) -> None:
        """Takes no new leases, gives open ones grace_s to end, ends the rest, removes the arena. Idempotent."""
        store, server, arena, replication = self._store, self._server, self._arena, self._replication
        if store is None or server is None or arena is None or replication is None:
            return
        self._store = None
        replication.stop()  # a copy in a store that stops is of use to nobody
        await store.drain(grace_s)
        await server.stop(0.5)
        await asyncio.to_thread(store.data.stop)
        await store.tiers.close()
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        arena.close()

    @property
    def capacity_tokens(self) -> int:
        """Tokens of KV that the arena holds; 0 before the first client where no schema was given."""
        store = self._running()
        return 0 if store.schema is None else store.accounting().num_slots * store.schema.block_size

    def accounting(self) -> Accounting:
        """Slots of the arena: num_slots = num_leased + num_cached + num_free."""
        return self._running().accounting()

    def stats(self) -> kvstore_pb2.StatsReply:
        return self._running().stats()

    def load(self) -> StoreLoad:
        """What a member report of this store says."""
        stats = self._running().stats()
        total = max(1, stats.num_bytes_arena)
        used = stats.num_bytes_leased + stats.num_bytes_cached
        ssd = stats.num_bytes_ssd, stats.num_bytes_ssd_used
        return StoreLoad(stats.num_leases, stats.num_handoffs, stats.num_sessions, used / total, stats.num_bytes_leased / total, *ssd)

    def know_stores(self, addresses: Iterable[str]) -> None:
        """The stores of the cluster as the proxy tells them: those that blocks may be copied from."""
        if self._replication is not None:
            self._replication.sources = frozenset(addresses)

    def proxy_left(self) -> None:
        """The Join stream has ended. Hand-offs that nobody will fetch are freed at once, not at their requests' deadlines."""
        self._running().proxy_left()

    def _running(self) -> Store:
        if self._store is None:
            raise RuntimeError("the store server is not running; start it first")
        return self._store
