"""The index over Watch streams: of an in-memory source behind a real listener, and of a real store."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, control_pb2
from halfmoon.proxy.prefixes.index import PrefixIndex


def index_of(bench: Any) -> PrefixIndex:
    return bench.router._index


async def settled(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_snapshot_then_changes(bench: Any, peers: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a", b"b"])
    await settled(lambda: index.leading_runs([b"a", b"b", b"c"]) == {store.address: 2})
    store.publish(stored=[b"c"], evicted=[b"b"])
    await settled(lambda: index.leading_runs([b"a", b"b", b"c"]) == {store.address: 1})
    assert store.num_watches == 1


async def test_a_gap_is_healed_by_a_fresh_snapshot(bench: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a"])
    store.held.append(b"lost")
    store.publish(stored=[b"b"], skip=1)
    await settled(lambda: index.leading_runs([b"a", b"lost", b"b"]) == {store.address: 3})
    assert store.num_watches == 2


async def test_a_lost_stream_is_taken_up_again(bench: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a"])
    await settled(lambda: len(index) == 1)
    for watcher in store.watchers:
        watcher.put_nowait(None)
    store.held = [b"b"]
    await settled(lambda: index.leading_runs([b"b"]) == {store.address: 1})
    assert index.leading_runs([b"a"]) == {}


async def test_a_store_that_leaves_is_forgotten_and_a_restarted_one_is_read_anew(bench: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a"])
    await settled(lambda: len(index) == 1)
    await store.kill()
    await settled(lambda: len(index) == 0)
    store.held = [b"b"]
    await bench.join(store)
    await settled(lambda: index.leading_runs([b"b"]) == {store.address: 1})


async def test_cache_aware_follows_the_prefix_and_hints_at_it(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 1, policy="cache_aware")
    other = await bench.add("store")
    warm = await bench.add("prefill", other)
    prompts = [list(range(50, 71)), list(range(150, 171))]  # 21 tokens, 5 full blocks of 4
    keys = [block_keys(root_key(peers.SCHEMA.fingerprint), prompt, 4) for prompt in prompts]
    await settled(lambda: other.num_watches == 1)
    other.publish(stored=keys[0] + keys[1])
    await settled(lambda: len(index_of(bench)) == 10)
    await peers.read(bench.router.open(bench.request(prompts[0])))
    assert len(warm.requests) == 1 and not warm.requests[0].HasField("prefix")
    await warm.kill()
    await settled(lambda: warm.id not in bench.cluster.members)
    await peers.read(bench.router.open(bench.request(prompts[1])))
    hint = bench.prefills[0].requests[0].prefix
    assert (hint.store_address, hint.num_blocks) == (other.address, 5)


async def test_what_is_placed_is_expected_where_it_will_stand_until_it_is_given_up(bench: Any, peers: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a"])
    await settled(lambda: len(index) == 1)
    prompt = list(range(50, 71))
    keys = block_keys(root_key(peers.SCHEMA.fingerprint), prompt, 4)
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(bench.request(prompt))
    assert index.leading_runs(keys) == {store.address: 5} and len(index) == 1
    await stream.cancel("the test has seen enough")
    assert index.leading_runs(keys) == {}


async def test_whatever_gets_lost_on_the_way_the_index_ends_up_with_what_the_store_holds(bench: Any) -> None:
    rng = random.Random(5)
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    keys = [bytes([n]) * 16 for n in range(8)]
    for _ in range(40):
        fault = rng.choice(["none", "none", "none", "lost", "lost", "stream", "restart"])
        stored = [key for key in rng.sample(keys, 3) if key not in store.held]
        evicted = rng.sample(store.held, rng.randint(0, len(store.held)))
        if fault == "lost":  # changes that nobody hears of, and the gap that they leave
            store.held = [key for key in keys if rng.random() < 0.5]
            stored = [key for key in stored if key not in store.held]
            evicted = [key for key in evicted if key in store.held]
        if fault == "stream":
            for watcher in store.watchers:
                watcher.put_nowait(None)
        if fault == "restart":
            await store.kill()
            store.held, store.sequence, store.watchers = [key for key in keys if rng.random() < 0.5], 0, []
            await bench.join(store)
        else:
            store.publish(stored, evicted, skip=int(fault == "lost"))
        await asyncio.sleep(0.01 * rng.random())
    held = set(store.held)
    await settled(lambda: len(index) == len(held) and all(index.holders(key) == [store.address] for key in held))


async def test_a_real_store_s_seals_and_evictions_reach_the_index(bench: Any, peers: Any) -> None:
    schema: KVSchema = peers.SCHEMA
    server = StoreServer(StoreConfig(arena_bytes=8 * schema.block_bytes), node_id="node", schema=schema)
    address = await server.start("127.0.0.1")
    info = control_pb2.MemberInfo(id="store-real", incarnation="1", role=control_pb2.ROLE_STORE, address=address, store_address=address)
    member = bench.cluster.join(info, control_pb2.MemberLoad())
    client = await StoreClient.attach(address, client_id="test", node_id="elsewhere", schema=schema)
    keys = [bytes([n]) * 16 for n in range(16)]

    async def cache(some: list[bytes]) -> None:
        writer = await client.cache(some, 0)
        for layer in range(schema.num_layers):
            blocks = np.full((len(some), schema.layer_bytes), layer, dtype=np.uint8)
            await asyncio.to_thread(writer.push, layer, 0, blocks)
        await writer.seal(common_pb2.HandoffState(num_tokens=len(some) * schema.block_size))

    try:
        index = index_of(bench)
        await cache(keys[:4])
        await settled(lambda: index.leading_runs(keys) == {address: 4})
        num_slots = server.accounting().num_slots
        await cache(keys[4:8])
        await settled(lambda: index.leading_runs(keys) == {address: 8})
        await cache(keys[8 : 8 + min(num_slots, 8)])  # evicts what is oldest
        await settled(lambda: index.leading_runs(keys) == {} and len(index) == min(num_slots, 8))
        bench.cluster.leave(member, member.stream)
        assert len(index) == 0
    finally:
        await client.close()
        await server.stop(0)


async def test_a_store_whose_following_breaks_on_a_bug_is_forgotten_and_read_anew(bench: Any, monkeypatch: Any, caplog: Any) -> None:
    store, index = bench.stores[0], index_of(bench)
    await settled(lambda: store.num_watches == 1)
    store.publish(stored=[b"a"])
    await settled(lambda: len(index) == 1)
    monkeypatch.setattr("halfmoon.proxy.prefixes.watch.RESTART_INTERVAL_S", 0.05)

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(index, "change", broken)
        store.publish(stored=[b"b"])
        await settled(lambda: len(index) == 0)
    await settled(lambda: index.leading_runs([b"a", b"b"]) == {store.address: 2})
    assert "RuntimeError: a bug" in caplog.text
