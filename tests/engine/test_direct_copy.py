"""Pages to a store's pinned arena and back on CUDA, through real stores: every byte, odd pages, both transports."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch

from halfmoon.engine import pinned_memory, row_copy
from halfmoon.engine.kv_cache import PagedKVCache
from halfmoon.engine.page_copy import cache_pages, load_pages
from halfmoon.engine.page_transfer import LocalPageTransfer
from halfmoon.engine.transfer import TransferThread
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import HalfmoonError, RequestCancelled
from halfmoon.protocol.schema import KVSchema

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(300)]

NUM_PAGES, NUM_SLOTS = 40, 24
DEVICE = torch.device("cuda", 0)


class Site:
    def __init__(self, dtype: str) -> None:
        self.schema = KVSchema("f" * 32, dtype, 5, 3, 48, 16)
        self.cache = PagedKVCache(self.schema, NUM_PAGES, DEVICE)
        view = self.cache.data.view(torch.uint8)
        view.copy_(torch.randint(0, 100, view.shape, dtype=torch.uint8, device=DEVICE))
        self.crashes: list[BaseException] = []
        self.transfer = TransferThread("transfer", DEVICE, self.crashes.append)
        self.pages = LocalPageTransfer(self.cache, self.transfer)

    async def start(self, transport: str) -> None:
        self.store = StoreServer(StoreConfig(arena_bytes=NUM_SLOTS * self.schema.block_bytes), node_id="n")
        await self.store.start("127.0.0.1")
        choice: Any = "auto" if transport == "shm" else transport
        self.client = await StoreClient.attach(self.store.address, client_id="worker", node_id="n", schema=self.schema, transport=choice)
        assert self.client.transport == transport
        self.pin()

    def pin(self) -> None:
        if self.client.arena is not None:
            self.pages.pin(self.client.arena)

    async def stop(self) -> None:
        await self.client.close()
        await asyncio.to_thread(self.pages.close)
        await self.store.stop(0)
        assert not self.crashes and not self.cache.pinned._held

    def bytes_of(self, pages: list[int]) -> np.ndarray:
        return np.stack([self.cache.read_bytes(layer, pages) for layer in range(self.schema.num_layers)])

    async def save(self, keys: list[bytes], pages: list[int], **options) -> None:
        await cache_pages(self.pages, pages, await self.client.cache(keys, 0.0), **options)

    async def load(self, keys: list[bytes], pages: list[int]) -> None:
        reader = await self.client.fetch_prefix(keys)
        assert reader.num_blocks == len(keys)
        await load_pages(self.pages, pages, reader)
        await reader.release()


@pytest.fixture(params=["shm", "tcp", "grpc"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    made = Site("bfloat16")
    await made.start(request.param)
    yield made
    await made.stop()


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name}{index}".encode().ljust(16, b".") for index in range(count)]


async def round_trip(site: Site) -> None:
    """Pages in random order, blocks of which some are there already, slots in several runs."""
    everything = random.Random(5).sample(range(NUM_PAGES), NUM_PAGES)
    before = site.bytes_of(list(range(NUM_PAGES)))
    await site.save(keys_of("a", 7), everything[:7])
    # blocks 2 and 3 of the next lease stand in the store, with the bytes of other pages of the same content
    mixed = [*keys_of("b", 2), *keys_of("a", 7)[2:4], *keys_of("c", 3)]
    await site.save(mixed, [*everything[7:9], *everything[2:4], *everything[9:12]])
    for keys, source in ((keys_of("a", 7), everything[:7]), (mixed, [*everything[7:9], *everything[2:4], *everything[9:12]])):
        into = everything[20 : 20 + len(keys)]
        await site.load(keys, into)
        assert np.array_equal(site.bytes_of(into), before[:, source])
    untouched = everything[:20] + everything[27:]
    assert np.array_equal(site.bytes_of(untouched), before[:, untouched])


async def test_bytes_come_back_as_they_were_over_both_transports(site: Site) -> None:
    assert (site.client.arena is not None) == (len(site.cache.pinned._held) == 1)
    await round_trip(site)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3fn"])
async def test_bytes_of_every_dtype_come_back(dtype: str) -> None:
    site = Site(dtype)
    await site.start("shm")
    await round_trip(site)
    await site.stop()


async def test_without_the_runtimes_bindings_rows_are_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_copy, "_runtime", lambda: None)
    site = Site("bfloat16")
    await site.start("shm")
    await round_trip(site)
    await site.stop()


async def test_an_arena_that_can_not_be_pinned_is_used_by_way_of_buffers(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(pinned_memory, "PORTABLE", 1 << 30)  # no flag that the driver knows
    site = Site("bfloat16")
    await site.start("shm")
    assert not site.cache.pinned._held and "can't be pinned" in caplog.text
    await round_trip(site)
    assert float(torch.ones(8, device=DEVICE).sum()) == 8  # the refusal is nobody else's error
    await site.stop()


async def test_a_lost_stores_arena_is_unpinned_and_what_is_left_in_it_can_still_be_read() -> None:
    site = Site("bfloat16")
    await site.start("shm")
    before = site.bytes_of([3, 1, 2])
    await site.save(keys_of("x", 3), [3, 1, 2])
    reader = await site.client.fetch_prefix(keys_of("x", 3))
    assert site.client.arena is not None
    site.pages.unpin(site.client.arena.memory)
    await load_pages(site.pages, [9, 30, 10], reader)
    assert not site.cache.pinned._held
    assert np.array_equal(site.bytes_of([9, 30, 10]), before)
    await reader.release()
    site.pin()  # unregistered: it can be registered anew
    assert len(site.cache.pinned._held) == 1
    await round_trip(site)
    await site.stop()


async def test_pages_that_are_taken_away_while_they_are_copied_are_not_stored(site: Site) -> None:
    with pytest.raises(RequestCancelled, match="lost its pages"):
        await site.save(keys_of("a", 3), [1, 2, 3], are_held=lambda: False)
    assert await site.client.lookup(keys_of("a", 3)) == 0
    await round_trip(site)


async def test_a_lease_lost_during_a_push_fails_it_and_frees_its_slots(site: Site) -> None:
    writer = await site.client.reserve("h", 1, keys_of("h", 4), 4, 30.0)
    await site.client.abort("h", 1, RequestCancelled("the user closed the window"))
    with pytest.raises(HalfmoonError):
        await cache_pages(site.pages, [5, 4, 7, 6], writer)
    async with asyncio.timeout(60):
        while site.store.accounting().num_free != NUM_SLOTS:
            await asyncio.sleep(0.005)
    await round_trip(site)


async def test_landings_come_in_order_and_after_their_copies(site: Site) -> None:
    landed: list[int] = []
    source = torch.arange(2**24, dtype=torch.int32, device=DEVICE)
    targets = [torch.zeros(2**24, dtype=torch.int32, pin_memory=True) for _ in range(6)]

    def call(index: int):
        targets[index].copy_(source, non_blocking=True)

        def land() -> None:
            assert int(targets[index][-1]) == 2**24 - 1
            landed.append(index)

        return land

    for index in range(6):
        site.transfer.submit(lambda index=index: call(index), after=site.transfer.event())
    await site.transfer.drained()
    assert landed == list(range(6))
