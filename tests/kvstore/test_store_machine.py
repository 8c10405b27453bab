"""Whatever is done to a store with two tiers, and whatever breaks, in any order: a plain dictionary knows what may be read."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections.abc import Coroutine
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.reader import BlockReader
from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.ssd_files import SsdFiles
from halfmoon.kvstore.writer import BlockWriter
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import DeadlineExceeded, HandoffAborted, StaleEpoch, StoreFull, WorkerLost
from halfmoon.protocol.v1 import common_pb2

NUM_SLOTS = 8
CHAINS = st.sampled_from("abc")
WAYS = st.sampled_from(["auto", "tcp", "grpc"])
write, read = SsdFiles.write, SsdFiles.read


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, kv: Any) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp()
        self.kv = kv
        self.sealed: dict[str, int] = {}  # chain: its longest run that was ever sealed
        self.open: list[BlockWriter | BlockReader] = []
        self.clients: dict[str, StoreClient] = {}
        self.num_handoffs = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    @initialize()
    def start(self) -> None:
        config = StoreConfig(
            arena_bytes=NUM_SLOTS * self.kv.schema.block_bytes,
            ssd_path=self.folder,
            ssd_bytes=12 * 4096,
            ssd_free_ratio=0.5,
            eviction="cost",
        )
        self.store = StoreServer(config, node_id=self.kv.node, schema=self.kv.schema)
        self.run(self.store.start("127.0.0.1"))

    def client(self, way: str) -> StoreClient:
        if way not in self.clients:
            attach = StoreClient.attach(self.store.address, client_id=way, node_id=self.kv.node, schema=self.kv.schema, transport=way)  # type: ignore[arg-type]
            self.clients[way] = self.run(attach)
        return self.clients[way]

    @rule(chain=CHAINS, num_blocks=st.integers(1, 5), way=WAYS)
    def cache(self, chain: str, num_blocks: int, way: str) -> None:
        try:
            self.run(self.kv.cache(self.client(way), chain, num_blocks, 0))
        except StoreFull:
            return
        self.sealed[chain] = max(self.sealed.get(chain, 0), num_blocks)

    @rule(chain=CHAINS, num_blocks=st.integers(1, 5), way=WAYS, ssd=st.sampled_from(common_pb2.SsdUse.values()))
    def read_prefix(self, chain: str, num_blocks: int, way: str, ssd: Any) -> None:
        async def work() -> None:
            reader = await self.client(way).fetch_prefix(self.kv.keys(chain, num_blocks), ssd=ssd)
            found = await self.kv.read(reader)
            await reader.release()
            assert len(found) <= min(self.sealed.get(chain, 0), num_blocks)
            assert np.array_equal(found, self.kv.blocks(chain, num_blocks)[: len(found)])

        self.client(way)
        self.run(work())

    @rule(chain=CHAINS, num_blocks=st.integers(1, 4), writer=WAYS, reader=WAYS)
    def hand_off(self, chain: str, num_blocks: int, writer: str, reader: str) -> None:
        name = self.name()

        async def work() -> None:
            reserved = await self.client(writer).reserve(name, 1, self.kv.keys(chain, num_blocks), num_blocks, 0.3)
            fetching = asyncio.ensure_future(self.client(reader).fetch(name, 1, 10))
            found = await fetching
            await self.kv.push(reserved, self.kv.blocks(chain, num_blocks))
            await reserved.seal(self.kv.state)
            assert np.array_equal(await self.kv.read(found), self.kv.blocks(chain, num_blocks))
            await found.release()

        self.client(writer), self.client(reader)
        try:
            self.run(work())
        except (StoreFull, HandoffAborted, DeadlineExceeded, StaleEpoch):
            return  # no room at once, or its deadline was there before the fetch
        self.sealed[chain] = max(self.sealed.get(chain, 0), num_blocks)

    @rule(num_blocks=st.integers(1, 3), way=WAYS)
    def begin_and_leave(self, num_blocks: int, way: str) -> None:
        name = self.name()
        try:
            self.open.append(self.run(self.client(way).reserve(name, 1, self.kv.keys(name, num_blocks), num_blocks, 30)))
        except DeadlineExceeded:
            return

    @rule(chain=CHAINS, way=WAYS)
    def hold(self, chain: str, way: str) -> None:
        self.open.append(self.run(self.client(way).fetch_prefix(self.kv.keys(chain, 2))))

    @rule()
    def end_all(self) -> None:
        for lease in self.open:
            self.run(lease.release() if isinstance(lease, BlockReader) else lease.abort(WorkerLost("no longer wanted")))
        self.open.clear()
        self.run(self.rest())

    @rule(way=WAYS)
    def lose_a_session(self, way: str) -> None:
        if (client := self.clients.pop(way, None)) is not None:
            self.open = [lease for lease in self.open if lease._connection is not client._connection]
            self.run(client.close())

    @rule()
    def restart(self) -> None:
        self.open.clear()
        self.run(self.store.stop(0))
        for client in self.clients.values():
            self.run(client.close())
        self.clients.clear()
        self.start()

    @rule(mode=st.sampled_from(["well", "full", "broken", "torn"]))
    def disk(self, mode: str) -> None:
        def failing(*args: object) -> Any:
            raise OSError(errno.ENOSPC if mode == "full" else errno.EIO, mode)

        def tearing(files: SsdFiles, place: int, key: bytes, checksum: int, block: np.ndarray) -> None:
            torn = block.copy()
            torn[-1] ^= 1
            write(files, place, key, checksum, torn)

        SsdFiles.write = {"well": write, "full": failing, "broken": write, "torn": tearing}[mode]
        SsdFiles.read = failing if mode == "broken" else read

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "store"):
            slots = self.store.accounting()
            assert slots.num_leased + slots.num_cached + slots.num_free == NUM_SLOTS

    async def rest(self) -> None:
        while self.store.accounting().num_leased:
            await asyncio.sleep(0.001)

    def name(self) -> str:
        self.num_handoffs += 1
        return f"r{self.num_handoffs}"

    def teardown(self) -> None:
        SsdFiles.write, SsdFiles.read = write, read
        if hasattr(self, "store"):
            self.end_all()
            for client in self.clients.values():
                self.run(client.close())
            self.run(self.store.stop(0))
        self.run(asyncio.sleep(0))
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)


def test_what_is_read_is_what_was_sealed_whatever_happens(kv) -> None:
    run_state_machine_as_test(lambda: StoreMachine(kv), settings=settings(max_examples=6, stateful_step_count=25, deadline=None))
