"""The SSD tier: what goes there, comes back, survives, and is never given out."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from halfmoon.kvstore.server import StoreServer
from halfmoon.kvstore.ssd_files import SsdFiles
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2
from halfmoon.tests.waiting import until

NUM_SLOTS = 10


@pytest.fixture
async def start(kv, tmp_path, attach_to):
    """start(ssd_blocks=20) -> (a running store with an SSD tier, its client); again over the same files after a stop."""
    running: list[StoreServer] = []

    async def run(ssd_blocks: int = 20, free_ratio: float = 0.5):
        config = StoreConfig(
            arena_bytes=NUM_SLOTS * kv.schema.block_bytes,
            ssd_path=str(tmp_path / "ssd"),
            ssd_bytes=ssd_blocks * 4096,
            ssd_free_ratio=free_ratio,
        )
        running.append(StoreServer(config, node_id=kv.node, schema=kv.schema))
        await running[-1].start("127.0.0.1")
        return running[-1], await attach_to(running[-1].address, "c")

    yield run
    for server in running:
        await server.stop(0)


def tier(server: StoreServer):
    found = server._running().tiers._ssd
    assert found is not None
    return found


async def settled(server: StoreServer) -> None:
    """No demotion is under way or due."""
    await until(lambda: tier(server)._demoting is None)
    slots = server.accounting()
    assert slots.num_leased == 0 and sum(slots[1:]) == NUM_SLOTS


async def read(kv, client, name: str, num_blocks: int, **options) -> np.ndarray:
    reader = await client.fetch_prefix(kv.keys(name, num_blocks), **options)
    found = await kv.read(reader)
    await reader.release()
    return found


async def test_cooled_blocks_go_to_the_ssd_and_come_back_when_asked_for(kv, start) -> None:
    server, client = await start()
    sent: dict[str, np.ndarray] = {}
    for name in "abcd":
        sent[name] = await kv.cache(client, name, 4)
        await settled(server)
    assert server.accounting().num_free >= 5
    for name in "abcd":
        assert await client.lookup(kv.keys(name, 4)) == 4
        assert np.array_equal(await read(kv, client, name, 4), sent[name])
        await settled(server)


async def test_watchers_see_every_tier_change_and_a_snapshot_says_the_same(kv, start) -> None:
    server, client = await start(ssd_blocks=6)
    held: dict[bytes, str] = {}
    watch = client.watch()
    assert (await anext(watch)).snapshot

    async def follow() -> None:
        async for change in watch:
            for key in change.stored:
                assert key not in held
                held[key] = "dram"
            for key in change.evicted:
                del held[key]
            for keys, tier_name in ((change.demoted, "ssd"), (change.promoted, "dram")):
                for key in keys:
                    assert held[key] != tier_name
                    held[key] = tier_name

    following = asyncio.create_task(follow())
    for name in "abcdefab":
        await kv.cache(client, name, 3)
        await read(kv, client, name, 3)
        await settled(server)
    other = client.watch()
    snapshot = await anext(other)
    on_ssd = set(snapshot.demoted)
    expected = {key: "ssd" if key in on_ssd else "dram" for key in snapshot.stored}
    await until(lambda: following.done() or held == expected)
    assert not following.done() and on_ssd
    following.cancel()


async def test_a_restart_serves_what_stood_on_the_ssd(kv, start) -> None:
    server, client = await start()
    sent: dict[str, np.ndarray] = {}
    for name in "abc":
        sent[name] = await kv.cache(client, name, 4)
        await settled(server)
    held = {name: sum(tier(server).holds(key) for key in kv.keys(name, 4)) for name in "abc"}
    assert sum(held.values()) >= 5
    await server.stop(0)
    server, client = await start()
    snapshot = await anext(client.watch())
    assert len(snapshot.stored) == len(snapshot.demoted) == sum(held.values())
    for name in "abc":
        found = await read(kv, client, name, 4)
        assert np.array_equal(found, sent[name][: len(found)])
        await settled(server)
    assert len(await read(kv, client, "a", 4)) == 4


@pytest.mark.parametrize("torn", ["block", "record"])
async def test_what_is_torn_is_dropped_and_never_served(kv, start, tmp_path, torn) -> None:
    server, client = await start()
    await kv.cache(client, "a", 10)
    await settled(server)
    on_ssd = [index for index, key in enumerate(kv.keys("a", 10)) if tier(server).holds(key)]
    first = min(on_ssd)
    place = tier(server)._place(kv.keys("a", 10)[first])
    await server.stop(0)
    path, offset = (
        (tmp_path / "ssd" / "segment-0000.bin", place * 4096) if torn == "block" else (tmp_path / "ssd" / "index.bin", place * 64)
    )
    with path.open("r+b") as file:
        file.seek(offset + 9)
        byte = file.read(1)[0]
        file.seek(offset + 9)
        file.write(bytes([byte ^ 1]))
    server, client = await start()
    await kv.cache(client, "a", first)  # what stood in DRAM
    found = await read(kv, client, "a", 10)
    assert np.array_equal(found, kv.blocks("a", 10)[: len(found)]) and len(found) == first
    assert await client.lookup(kv.keys("a", 10)) == first
    await settled(server)


async def test_leased_and_handed_off_blocks_stay_in_dram(kv, start) -> None:
    server, client = await start()
    await kv.hand_off(client, "r1", 8)
    assert server.accounting().num_leased == 8
    await kv.cache(client, "b", 2)
    await until(lambda: tier(server)._demoting is None)
    assert server.load()[-2:] == (tier(server).num_places * kv.schema.block_bytes, 2 * kv.schema.block_bytes)
    assert not any(tier(server).holds(key) for key in kv.keys("r1", 7)) and tier(server).num_blocks == 2
    assert np.array_equal(await kv.read(await client.fetch("r1", 1, 5)), kv.blocks("r1", 8))


async def test_two_readers_of_one_prefix_read_it_from_the_disk_once(kv, start, monkeypatch) -> None:
    server, client = await start()
    for name in "abc":
        await kv.cache(client, name, 4)
        await settled(server)
    reads: list[int] = []
    gate, plain = threading.Event(), SsdFiles.read

    def counted(self, place, checksum, block):
        reads.append(place)
        gate.wait()
        return plain(self, place, checksum, block)

    monkeypatch.setattr(SsdFiles, "read", counted)
    both = [asyncio.create_task(read(kv, client, "a", 4)) for _ in range(2)]
    await until(lambda: len(reads) > 0)
    await client.stats()
    gate.set()
    found = await asyncio.gather(*both)
    assert all(np.array_equal(one, kv.blocks("a", 4)) for one in found)
    assert len(reads) == len(set(reads))


async def test_a_disk_slower_than_computing_is_left_alone(kv, start) -> None:
    server, client = await start()
    for name in "abc":
        await kv.cache(client, name, 4)
        await settled(server)
    tier(server)._seconds_a_block = 0.5
    on_dram = (await client._connection.call(client._connection.stub.Lookup, _lookup(kv, "a", 4))).num_blocks_dram
    assert on_dram < 4
    assert len(await read(kv, client, "a", 4, compute_s=0.4)) == on_dram
    assert len(await read(kv, client, "a", 4, compute_s=0.6, ssd=common_pb2.SSD_USE_LEAVE)) == on_dram, "the caller has decided"
    assert len(await read(kv, client, "a", 4, compute_s=0.6)) == 4
    assert len(await read(kv, client, "b", 4, compute_s=0.4, ssd=common_pb2.SSD_USE_LOAD)) == 4


async def test_a_reader_is_told_what_was_read_from_the_disk_for_it_alone(kv, start, monkeypatch) -> None:
    server, client = await start(free_ratio=0.3)
    for name in "abc":
        await kv.cache(client, name, 4)
        await settled(server)
    gate, plain, reads = threading.Event(), SsdFiles.read, []

    def gated(self, place, checksum, block):
        reads.append(place)
        gate.wait()
        return plain(self, place, checksum, block)

    monkeypatch.setattr(SsdFiles, "read", gated)
    first = asyncio.create_task(client.fetch_prefix(kv.keys("a", 4)))
    await until(lambda: len(reads) > 0)
    second = asyncio.create_task(client.fetch_prefix(kv.keys("a", 4)))
    await client.stats()  # it has come to the store by now
    gate.set()
    readers = await asyncio.gather(first, second)
    third = await client.fetch_prefix(kv.keys("a", 4))
    assert readers[0].num_ssd_blocks == len(reads) and readers[0].ssd_wait_s > 0
    assert readers[1].num_ssd_blocks == third.num_ssd_blocks == 0, "they read nothing themselves"
    for reader in (*readers, third):
        await reader.release()


async def test_a_disk_that_hangs_costs_its_readers_a_while_and_no_request(kv, start, monkeypatch) -> None:
    server, client = await start(free_ratio=0.3)
    for name in "abc":
        await kv.cache(client, name, 4)
        await settled(server)
    gate, plain = threading.Event(), SsdFiles.read
    monkeypatch.setattr(SsdFiles, "read", lambda *arguments: gate.wait() and plain(*arguments))
    held = await client._connection.call(client._connection.stub.Lookup, _lookup(kv, "a", 4))
    num_cold = held.num_blocks - held.num_blocks_dram
    for expected in (num_cold, 0):  # the second waits for the first one's read
        reader = await client.fetch_prefix(kv.keys("a", 4), compute_s=1e-6, ssd=common_pb2.SSD_USE_LOAD)
        assert (reader.num_blocks, reader.num_ssd_blocks) == (held.num_blocks_dram, expected) and reader.ssd_wait_s > 0.2
        await reader.release()
    gate.set()
    await until(lambda: not tier(server)._promoting)
    assert np.array_equal(await read(kv, client, "a", held.num_blocks), kv.blocks("a", held.num_blocks))
    await settled(server)


async def test_blocks_come_up_ahead_of_a_fetch_and_are_not_read_again(kv, start) -> None:
    server, client = await start(free_ratio=0.3)
    for name in "abc":
        await kv.cache(client, name, 4)
        await settled(server)
    held = await client._connection.call(client._connection.stub.Lookup, _lookup(kv, "a", 4))
    ask = kvstore_pb2.PromoteRequest(block_keys=kv.keys("a", 4))
    found = await client._connection.call(client._connection.stub.Promote, ask)
    assert found.num_blocks == held.num_blocks - held.num_blocks_dram > 0 and found.wait_s > 0
    reader = await client.fetch_prefix(kv.keys("a", 4))
    assert reader.num_blocks == held.num_blocks and reader.num_ssd_blocks == 0
    await reader.release()
    assert not (await client._connection.call(client._connection.stub.Promote, kvstore_pb2.PromoteRequest())).num_blocks


def _lookup(kv, name: str, num_blocks: int):
    return kvstore_pb2.LookupRequest(block_keys=kv.keys(name, num_blocks))


@pytest.mark.parametrize("what", ["write", "read"])
async def test_a_disk_that_fails_costs_prefixes_and_nothing_else(kv, start, monkeypatch, what) -> None:
    server, client = await start()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC if what == "write" else errno.EIO, "broken")

    monkeypatch.setattr(SsdFiles, what, full)
    for name in "abcdefgh":
        sent = await kv.cache(client, name, 4)
        await until(lambda: tier(server)._demoting is None)
        assert np.array_equal(await read(kv, client, name, 4), sent)
        found = await read(kv, client, "a", 4)
        assert np.array_equal(found, kv.blocks("a", 4)[: len(found)])
    await until(lambda: tier(server)._demoting is None)
    failed = server._running().metrics.registry.get_sample_value("halfmoon_store_ssd_blocks_total", {"outcome": "failed"})
    assert failed and failed <= 12
    assert sum(server.accounting()[1:]) == NUM_SLOTS and server.accounting().num_leased == 0


async def test_one_folder_is_for_one_store(kv, start, tmp_path) -> None:
    await start()
    config = StoreConfig(arena_bytes=2**20, ssd_path=str(tmp_path / "ssd"), ssd_bytes=2**20)
    with pytest.raises(ConfigError, match="another store's"):
        await StoreServer(config, node_id="n", schema=kv.schema).start("127.0.0.1")


def test_of_a_key_written_twice_the_later_one_counts(tmp_path: Path) -> None:
    files = SsdFiles(tmp_path, 8 * 4096, 100, b"s" * 16)
    files.write(3, b"k" * 16, 1, np.zeros(100, np.uint8))
    files.write(1, b"k" * 16, 2, np.ones(100, np.uint8))
    files.write(0, b"j" * 16, 3, np.ones(100, np.uint8))
    files.forget(0)
    files.close()
    again = SsdFiles(tmp_path, 8 * 4096, 100, b"s" * 16)
    assert [(record.place, record.checksum) for record in again.records()] == [(1, 2)]
    again.close()
    other = SsdFiles(tmp_path, 8 * 4096, 100, b"t" * 16)
    assert other.records() == []
    other.close()
