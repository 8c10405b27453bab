"""What the proxy knows of workers' pages, from their Join streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prefix_feed import PrefixFeed
from halfmoon.engine.prefix_pages import PrefixPages
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.channel import create_server
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.tasks import Tasks
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.members.member import Member
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.proxy.prefixes.page_watch import PageWatch

SIZE = 4
ROOT = root_key(b"model")
SCHEMA = KVSchema(model_fingerprint="m", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=SIZE)
KEYS = block_keys(ROOT, range(40), SIZE)
Change = control_pb2.PrefixChange


class Proxy:
    """As much of it as hears of workers' pages."""

    def __init__(self, index: PrefixIndex) -> None:
        self.cluster = Cluster(ProxyMetrics(CollectorRegistry()))
        self.index = index
        self.watch = PageWatch(self.cluster, index)
        self.told: list[control_pb2.MemberOrder] = []

    async def join(self, name: str, incarnation: int = 1) -> Member:
        info = control_pb2.MemberInfo(
            id=name, incarnation=f"{name}.{incarnation}", role=control_pb2.ROLE_DECODE, address="127.0.0.1:9", schema=SCHEMA.to_proto()
        )
        member = self.cluster.join(info, control_pb2.MemberLoad())
        await member.orders.open(self._write, control_pb2.MemberOrder(accepted=True))
        return member

    async def _write(self, order: control_pb2.MemberOrder) -> None:
        self.told.append(order)

    async def close(self) -> None:
        await self.watch.close()
        await self.cluster.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    found = Proxy(PrefixIndex())
    yield found
    await found.close()


async def test_changes_follow_the_whole_and_a_worker_that_leaves_is_forgotten(proxy: Proxy) -> None:
    one, other = await proxy.join("decode-0"), await proxy.join("decode-1")
    proxy.cluster.prefixes_changed(one, Change(number=1, whole=True, added=KEYS[:3]))
    proxy.cluster.prefixes_changed(other, Change(number=1, whole=True))
    proxy.cluster.prefixes_changed(one, Change(number=2, added=KEYS[3:5], removed=[KEYS[9]]))
    proxy.cluster.prefixes_changed(other, Change(number=2, added=KEYS[:1]))
    assert proxy.index.leading_runs(KEYS) == {"decode-0": 5, "decode-1": 1}
    proxy.cluster.prefixes_changed(one, Change(number=3, removed=KEYS[2:5]))
    assert proxy.index.leading_runs(KEYS) == {"decode-0": 2, "decode-1": 1}
    await proxy.join("decode-0", incarnation=2)
    assert proxy.index.leading_runs(KEYS) == {"decode-1": 1}, "a new process has empty pages"
    proxy.cluster.prefixes_changed(one, Change(number=4, added=KEYS))
    assert proxy.index.leading_runs(KEYS) == {"decode-1": 1}, "the old process's stream says nothing any more"


async def test_a_gap_voids_what_was_known_and_the_whole_is_asked_for(proxy: Proxy) -> None:
    member = await proxy.join("decode-0")
    proxy.cluster.prefixes_changed(member, Change(number=1, whole=True, added=KEYS[:3]))
    proxy.cluster.prefixes_changed(member, Change(number=3, added=KEYS[3:5]))
    assert proxy.index.leading_runs(KEYS) == {}
    async with asyncio.timeout(60):
        while len(proxy.told) < 2:
            await asyncio.sleep(0)
    assert proxy.told[-1].tell_prefixes
    proxy.cluster.prefixes_changed(member, Change(number=4, added=KEYS[5:6]))
    assert proxy.index.leading_runs(KEYS) == {}, "until it comes nothing is believed"
    proxy.cluster.prefixes_changed(member, Change(number=1, whole=True, added=KEYS[:2]))
    assert proxy.index.leading_runs(KEYS) == {"decode-0": 2}


async def test_the_whole_that_comes_again_takes_the_old_ones_place(proxy: Proxy) -> None:
    member = await proxy.join("decode-0")
    for keys in (KEYS[:6], KEYS[:2], KEYS[:4]):
        proxy.cluster.prefixes_changed(member, Change(number=1, whole=True, added=keys))
        assert proxy.index.leading_runs(KEYS) == {"decode-0": len(keys)}


class Control(control_pb2_grpc.ControlServicer):
    """Join as the proxy serves it, for one worker after another; it ends a stream when it is told to."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.end = asyncio.Event()
        self.num_streams = 0

    async def Join(self, request_iterator: AsyncIterator[control_pb2.MemberReport], context: object) -> AsyncIterator[object]:
        self.num_streams += 1
        member: Member | None = None
        yield control_pb2.MemberOrder(accepted=True)
        async for report in request_iterator:
            if report.HasField("info"):
                member = self.proxy.cluster.join(report.info, report.load)
            assert member is not None
            if report.HasField("prefixes"):
                self.proxy.cluster.prefixes_changed(member, report.prefixes)
            if self.end.is_set():
                self.end.clear()
                self.proxy.cluster.leave(member, member.stream)
                return


async def test_a_worker_that_joins_again_tells_the_whole_again(proxy: Proxy) -> None:
    allocator, changed = PageAllocator(20, PrefixPages(ROOT, SIZE)), threading.Condition()
    assert allocator.prefixes is not None
    feed = PrefixFeed(allocator.prefixes.changes, changed)

    def compute(num_tokens: int) -> None:
        sequence = Sequence("r", list(range(num_tokens)), num_tokens, SamplingParams(max_tokens=1), block_keys=[])
        with changed:
            assert allocator.take(sequence, -(-num_tokens // SIZE))
            sequence.num_computed_tokens = num_tokens
            allocator.keep(sequence)
            allocator.release(sequence)

    async def known(num_blocks: int) -> None:
        async with asyncio.timeout(60):
            while proxy.index.leading_runs(KEYS) != ({"decode-0": num_blocks} if num_blocks else {}):
                await asyncio.sleep(0.01)

    control, (server, port), tasks = Control(proxy), create_server("127.0.0.1", 0), Tasks("test")
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    await server.start()
    info = control_pb2.MemberInfo(
        id="decode-0", incarnation="1", role=control_pb2.ROLE_DECODE, address="127.0.0.1:9", schema=SCHEMA.to_proto()
    )
    compute(10)
    joining = stay_joined(f"127.0.0.1:{port}", info, control_pb2.MemberLoad, prefixes=feed)
    membership = tasks.spawn(joining, "the membership")
    try:
        await known(2)
        compute(21)
        await known(5)
        control.end.set()
        await known(0)
        await known(5)
        assert control.num_streams == 2
        with changed:
            allocator.allocate(18)  # 14 pages were free, and the tails go with what is least recently used
        async with asyncio.timeout(60):
            while proxy.index.leading_runs(KEYS).get("decode-0", 0) == 5:
                await asyncio.sleep(0.01)
        assert proxy.index.leading_runs(KEYS).get("decode-0", 0) == len(allocator.prefixes.find_run(KEYS))
    finally:
        membership.cancel()
        await tasks.close()
        await server.stop(0.0)
