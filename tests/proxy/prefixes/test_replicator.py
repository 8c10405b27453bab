"""Which prefixes are copied where: the decision by itself, then through real stores."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.v1 import common_pb2, control_pb2
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.prefixes.hot import DEPTHS, Budget, Copy, HotPrefixes, next_copy
from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.proxy.prefixes.replicator import RETRY_AFTER_S, Replicator
from halfmoon.proxy.prefixes.watch import PrefixWatch


def chain(name: str, num_blocks: int) -> list[bytes]:
    return [f"{name}/{index}".encode().ljust(16)[:16] for index in range(num_blocks)]


def test_depths_grow_by_a_quarter() -> None:
    assert DEPTHS[:8] == (1, 2, 3, 4, 5, 6, 7, 8) and sum(32 <= depth <= 8192 for depth in DEPTHS) <= 30
    assert all(later <= max(earlier + 1, earlier * 1.25) for earlier, later in itertools.pairwise(DEPTHS))


def test_the_longest_shared_run_is_hot_and_what_follows_it_is_not() -> None:
    prefixes = HotPrefixes(hits_a_copy=10)
    shared = chain("system", 100)
    for number in range(9):
        assert prefixes.hit([*shared, *chain(f"user{number}", 50)], 8, 0.0) is None
    hot = prefixes.hit([*shared, *chain("user9", 50)], 8, 0.0)
    assert hot is not None and hot.num_blocks == max(depth for depth in DEPTHS if depth <= 100) and hot.num_hits == 10
    assert prefixes.num_copies(hot) == 2
    assert prefixes.hit(chain("other", 100), 8, 0.0) is None
    assert HotPrefixes(hits_a_copy=1).hit(chain("short", 7), 8, 0.0) is None


@given(gaps=st.lists(st.floats(0, 40), min_size=1, max_size=60))
@settings(max_examples=200)
def test_hits_are_those_of_a_sliding_window_to_within_the_window_before(gaps: list[float]) -> None:
    prefixes, times, now = HotPrefixes(window_s=60.0, hits_a_copy=1), [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
        hot = prefixes.hit(chain("p", 8), 8, now)
        assert hot is not None
        assert 1 <= hot.num_hits <= sum(time >= now - 120 for time in times)
    assert sum(time >= prefixes._began_s for time in times) <= hot.num_hits


def test_what_was_hot_cools_down() -> None:
    prefixes = HotPrefixes(window_s=60.0, hits_a_copy=10)
    for _ in range(20):
        prefixes.hit(chain("p", 8), 8, 1.0)
    assert prefixes.hit(chain("p", 8), 8, 61.0) is not None
    assert prefixes.hit(chain("p", 8), 8, 100.0) is None
    assert prefixes.hit(chain("p", 8), 8, 1000.0) is None


def test_what_is_tracked_is_bounded() -> None:
    prefixes = HotPrefixes(max_tracked=100)
    for number in range(1000):
        prefixes.hit(chain(f"p{number}", 8), 8, 0.0)
        assert len(prefixes._hits) <= 100 + len(DEPTHS) and len(prefixes._hits_before) <= 100 + len(DEPTHS)


loads = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1)
stores = st.sets(st.sampled_from("abcdef"))


@given(stores, stores, loads, stores, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3)), st.integers(0, 7))
def test_a_copy_goes_from_a_holder_to_the_least_loaded_store_without_one(holders, coming, load_of, avoid, copies_from, wanted) -> None:
    copy = next_copy(
        [b"k"], wanted, holders=holders, coming=coming, load_of=load_of, copies_from=Counter(copies_from), avoid=avoid
    )  # fmt: skip
    takers = set(load_of) - holders - coming - avoid
    enough = len((holders | coming) & set(load_of)) >= wanted
    if copy is None:
        assert enough or not holders or not takers
    else:
        assert not enough and copy.source in holders and copy.target in takers
        assert load_of[copy.target] == min(load_of[store] for store in takers)
        assert copies_from.get(copy.source, 0) == min(copies_from.get(store, 0) for store in holders)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 3)), max_size=60))
def test_the_budget_holds_over_any_stretch_of_time(asked: list[tuple[int, float]]) -> None:
    budget, now, taken, largest = Budget(100.0), 0.0, 0, 0
    for num_bytes, gap in asked:
        now += gap
        if budget.has_left(now):
            budget.take(num_bytes)
            taken, largest = taken + num_bytes, max(largest, num_bytes)
        assert taken <= 100.0 * (1 + now) + largest + 1e-6


class Stage:
    """Two real stores and their prefill workers' memberships around a Replicator; time stands still."""

    def __init__(self, peers: Any, **options: Any) -> None:
        self.schema = peers.SCHEMA
        self.registry = CollectorRegistry()
        self.cluster = Cluster(ProxyMetrics(CollectorRegistry()), self.schema)
        self.index = PrefixIndex()
        self.watch = PrefixWatch(self.cluster, self.index)
        self.now = 0.0
        prefixes = HotPrefixes(hits_a_copy=4)
        options = {"replicate": "hot", **options}
        self.replicator = Replicator(self.cluster, self.index, self.registry, clock=lambda: self.now, prefixes=prefixes, **options)
        self.stores: list[StoreServer] = []
        self.keys = [bytes([n]) * 16 for n in range(200)]  # 800 tokens
        self.shared = max(depth for depth in DEPTHS if depth <= 200)

    async def add(self, num_slots: int = 256) -> StoreServer:
        number = len(self.stores)
        store = StoreServer(StoreConfig(arena_bytes=num_slots * self.schema.block_bytes), node_id=f"node-{number}", schema=self.schema)
        self.stores.append(store)
        address = await store.start("127.0.0.1")
        for role, name in ((control_pb2.ROLE_STORE, "store"), (control_pb2.ROLE_PREFILL, "prefill")):
            info = control_pb2.MemberInfo(id=f"{name}-{number}", incarnation="1", role=role, address=address, store_address=address)
            if name == "prefill":
                info.schema.CopyFrom(self.schema.to_proto())
            self.cluster.join(info, control_pb2.MemberLoad())
        return store

    async def cache(self, store: StoreServer, keys: list[bytes]) -> None:
        client = await StoreClient.attach(store.address, client_id="c", node_id="elsewhere", schema=self.schema)
        writer = await client.cache(keys, 0)
        for layer in range(self.schema.num_layers):
            blocks = np.full((len(keys), self.schema.layer_bytes), layer, dtype=np.uint8)
            await asyncio.to_thread(writer.push, layer, 0, blocks)
        await writer.seal(common_pb2.HandoffState())
        await client.close()
        await self.until(lambda: len(self.index.holders(keys[-1])) == 1)

    def place(self, times: int = 1) -> None:
        for _ in range(times):
            self.replicator.placed(self.keys)

    def outcome(self, name: str) -> float:
        return self.registry.get_sample_value("halfmoon_replications_total", {"outcome": name}) or 0.0

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self.replicator.close()
        await self.watch.close()
        await self.cluster.close()
        for store in self.stores:
            await store.stop(0)


async def test_a_hot_prefix_is_copied_once_to_the_other_store(peers: Any) -> None:
    stage = Stage(peers)
    source, target = await stage.add(), await stage.add()
    try:
        await stage.cache(source, stage.keys)
        stage.place(3)
        assert stage.replicator._under_way == []
        stage.place(5)
        assert stage.replicator._under_way == [Copy(source.address, target.address, stage.keys[: stage.shared])]
        await stage.until(lambda: stage.outcome("copied") == 1)
        await stage.until(lambda: stage.index.leading_runs(stage.keys).get(target.address) == stage.shared)
        assert target.accounting().num_cached == stage.shared
        stage.place(20)
        assert stage.replicator._under_way == [], "there is no third store"
        num_bytes = stage.registry.get_sample_value("halfmoon_replication_bytes_total")
        assert num_bytes == stage.shared * stage.schema.block_bytes
    finally:
        await stage.stop()


async def test_never_means_never(peers: Any) -> None:
    stage = Stage(peers, replicate="never")
    source, _ = await stage.add(), await stage.add()
    try:
        await stage.cache(source, stage.keys)
        stage.place(50)
        assert stage.replicator._under_way == []
    finally:
        await stage.stop()


async def test_copies_are_bounded_in_number_and_in_bytes(peers: Any) -> None:
    stage = Stage(peers, max_in_flight=1, bytes_per_s=1.0)
    source, *_ = [await stage.add() for _ in range(3)]
    try:
        await stage.cache(source, stage.keys)
        stage.place(8)
        assert len(stage.replicator._under_way) == 1 and stage.outcome("too_many") == 1
        await stage.until(lambda: stage.outcome("copied") == 1)
        await stage.until(lambda: len(stage.index.holders(stage.keys[stage.shared - 1])) == 2)
        stage.place()
        assert stage.replicator._under_way == [] and stage.outcome("over_budget") == 1
        stage.now += 59.0
        stage.place()
        assert stage.outcome("over_budget") == 2, "a byte a second pays for nothing in a minute"
    finally:
        await stage.stop()


async def test_a_failed_copy_is_tried_again_after_a_while(peers: Any) -> None:
    stage = Stage(peers)
    source, target = await stage.add(), await stage.add()
    try:
        await stage.cache(source, stage.keys)
        await source.stop(0)
        stage.place(4)
        assert len(stage.replicator._under_way) == 1
        await stage.until(lambda: stage.outcome("store_unavailable") == 1)
        stage.place(4)
        assert stage.replicator._under_way == []
        stage.now += RETRY_AFTER_S
        stage.place(1)
        assert len(stage.replicator._under_way) == 1
        assert target.accounting().num_leased == 0
    finally:
        await stage.stop()


async def test_a_target_that_leaves_ends_its_copy(peers: Any) -> None:
    stage = Stage(peers)
    source, _ = await stage.add(), await stage.add()
    try:
        await stage.cache(source, stage.keys)
        stage.place(4)
        assert len(stage.replicator._under_way) == 1
        member = stage.cluster.members["store-1"]
        stage.cluster.leave(member, member.stream)
        await stage.until(lambda: stage.replicator._under_way == [])
        (counted,) = [family for family in stage.registry.collect() if family.name == "halfmoon_replications"]
        assert sum(sample.value for sample in counted.samples if sample.name.endswith("_total")) == 1
    finally:
        await stage.stop()


async def test_a_copy_that_breaks_on_a_bug_is_counted_and_not_tried_there_again_at_once(peers: Any, monkeypatch: Any, caplog: Any) -> None:
    stage = Stage(peers)
    source = await stage.add()
    await stage.add()
    try:
        await stage.cache(source, stage.keys)

        def broken(address: str) -> Any:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(stage.cluster, "store_at", broken)
            stage.place(4)
            await stage.until(lambda: stage.replicator._under_way == [])
        assert stage.outcome("internal") == 1 and "RuntimeError: a bug" in caplog.text
        stage.place()
        assert stage.replicator._under_way == [], "not yet"
        stage.now += RETRY_AFTER_S + 1.0
        stage.place(4)
        await stage.until(lambda: stage.outcome("copied") == 1)
    finally:
        await stage.stop()


async def test_every_placement_is_told_to_the_replicator(bench: Any, peers: Any, monkeypatch: Any) -> None:
    told: list[list[bytes]] = []
    monkeypatch.setattr(bench.router._replicator, "placed", told.append)
    prompt = list(range(50, 71))
    await peers.read(bench.router.open(bench.request(prompt)))
    (keys,) = told
    assert keys == block_keys(root_key(peers.SCHEMA.fingerprint), prompt, 4)
