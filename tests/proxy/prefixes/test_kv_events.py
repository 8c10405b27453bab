"""KV events: what a subscriber makes of them is what the stores hold. The wire is checked with plain msgpack and vLLM's field order."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.config import ClusterConfig
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.prefixes.index import PrefixIndex
from halfmoon.proxy.prefixes.kv_events import BlockEvents, block_hash

BLOCK_SIZE = 4
CHAINS = [list(range(100 * number, 100 * number + 34)) for number in range(3)]
CHAINS.append([*CHAINS[0][:12], 7, 7, 7, 7, 7, 7, 7, 7])  # shares three blocks
KEYS = [block_keys(b"root", chain, BLOCK_SIZE) for chain in CHAINS]


class Subscriber:
    """As a router reads: hash -> (parent's hash, tokens)."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def read(self, event: list[Any]) -> None:
        if event[0] == "BlockStored":
            _, hashes, parent, token_ids, block_size, lora_id, medium = event
            assert (block_size, lora_id, medium) == (BLOCK_SIZE, None, "CPU") and len(token_ids) == len(hashes) * BLOCK_SIZE
            for index, found in enumerate(hashes):
                assert found not in self.blocks and 0 <= found < 2**64
                self.blocks[found] = (parent, tuple(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))
                parent = found
        elif event[0] == "BlockRemoved":
            _, hashes, medium = event
            assert medium == "CPU"
            for found in hashes:
                del self.blocks[found]
        else:
            assert event == ["AllBlocksCleared"]
            self.blocks.clear()


def expected(keys: set[bytes]) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    """Of all chains, the blocks among keys, straight from the tokens."""
    found: dict[int, tuple[int | None, tuple[int, ...]]] = {}
    for tokens, chain in zip(CHAINS, KEYS, strict=True):
        for index, key in enumerate(chain):
            if key in keys:
                parent = int.from_bytes(chain[index - 1][:8], "big") if index else None
                found[int.from_bytes(key[:8], "big")] = (parent, tuple(tokens[index * BLOCK_SIZE :][:BLOCK_SIZE]))
    return found


steps = st.lists(
    st.tuples(
        st.sampled_from(["know", "store", "holes", "evict", "both", "drop"]),
        st.sampled_from(["a:1", "b:2"]),
        st.integers(0, 3),
        st.integers(0, 8),
    ),
    max_size=40,
)


@given(steps)
def test_a_subscriber_knows_what_some_store_holds_of_the_prompts_that_came(found: list[tuple[str, str, int, int]]) -> None:
    index, subscriber = PrefixIndex(), Subscriber()
    events = BlockEvents(BLOCK_SIZE, index.is_held)
    told = list[tuple[list[bytes], list[bytes]]]()
    index.on_change = lambda new, gone: told.append((list(new), list(gone)))
    held: dict[str, set[bytes]] = {"a:1": set(), "b:2": set()}
    known = set[bytes]()
    for what, store, chain, num_blocks in found:
        keys = KEYS[chain][:num_blocks]
        if what == "know":
            for event in events.know(KEYS[chain], CHAINS[chain]):
                subscriber.read(event)
            known |= set(KEYS[chain])
        elif what == "store":
            index.change(store, keys, ())
            held[store] |= set(keys)
        elif what == "evict":
            index.change(store, (), KEYS[chain][num_blocks:])
            held[store] -= set(KEYS[chain][num_blocks:])
        elif what == "holes":
            index.change(store, KEYS[chain][num_blocks % 2 :: 2], ())
            held[store] |= set(KEYS[chain][num_blocks % 2 :: 2])
        elif what == "both":
            index.change(store, keys, KEYS[chain])
            held[store] = held[store] - set(KEYS[chain]) | set(keys)
        else:
            index.drop(store)
            held[store] = set()
        for new, gone in told:
            for event in events.changed(new, gone):
                subscriber.read(event)
            known -= set(gone) - set(new)  # their tokens are not kept
        told.clear()
        anywhere = held["a:1"] | held["b:2"]
        assert subscriber.blocks.keys() <= expected(anywhere).keys()
        for found_hash, block in subscriber.blocks.items():
            assert block == expected(anywhere)[found_hash]
        assert subscriber.blocks == expected(anywhere & known)


def test_blocks_that_no_store_takes_are_forgotten_the_oldest_first() -> None:
    events = BlockEvents(BLOCK_SIZE, lambda key: False, max_unstored=10)
    for tokens, chain in zip(CHAINS[:3], KEYS, strict=False):
        assert list(events.know(chain, tokens)) == []
    assert list(events.changed(KEYS[0], [])) == []
    ((_, hashes, parent, *_),) = events.changed(KEYS[2], [])
    assert len(hashes) == 8 and parent is None


async def run(bench: Any, peers: Any, number: int) -> list[bytes]:
    """A request with a prompt of its own, to its end. The keys of its prompt and its answer."""
    request = bench.request(list(range(100 * number, 100 * number + 10)))
    answer, _ = await peers.read(bench.router.open(request))
    return block_keys(root_key(peers.SCHEMA.fingerprint), [*request.token_ids, *answer], peers.SCHEMA.block_size)


async def test_what_stores_hold_is_published_and_what_a_subscriber_missed_is_sent_again(
    make_bench: Any, peers: Any, tmp_path: Path
) -> None:
    endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    bench = await make_bench(kv_events_endpoint=endpoint, kv_events_replay_endpoint=replay, kv_events_topic="kv")
    bench.router.kv_events.start()
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as asking:
        for socket, address in ((sub, endpoint), (asking, replay)):
            socket.linger = 0
            socket.connect(address)
        sub.subscribe(b"kv")
        async with asyncio.timeout(60):
            live: list[list[bytes]] = []
            stored: list[bytes] = []
            while not stored or hashes_of(live)[-1:] != [block_hash(stored[-1])]:  # a subscription takes effect some time after connect
                new = await run(bench, peers, len(stored))
                stored += new
                bench.stores[0].publish(stored=new)
                while await sub.poll(100):
                    live.append(await sub.recv_multipart())
            await asking.send_multipart([b"", bytes(8)])
            missed = list[tuple[int, bytes]]()
            while (batch := await asking.recv_multipart())[1] != (-1).to_bytes(8, "big", signed=True):
                missed.append((int.from_bytes(batch[1], "big"), batch[2]))
    assert [number for number, _ in missed] == list(range(len(missed)))
    for topic, number, payload in live:
        assert topic == b"kv" and missed[int.from_bytes(number, "big")][1] == payload
    first_s, events, rank = msgpack.unpackb(missed[0][1])
    assert first_s > 1e9 and events == [["AllBlocksCleared"]] and rank == 0
    assert hashes_of([b"", b"", payload] for _, payload in missed) == [block_hash(key) for key in stored]


def hashes_of(batches: Iterable[list[bytes]]) -> list[int]:
    """Of the blocks that they say are stored."""
    events = itertools.chain.from_iterable(msgpack.unpackb(payload)[1] for *_, payload in batches)
    return [found for kind, *fields in events if kind == "BlockStored" for found in fields[0]]


async def test_a_tenants_prompts_are_not_published(make_bench: Any, peers: Any, tmp_path: Path) -> None:
    bench = await make_bench(kv_events_endpoint=f"ipc://{tmp_path}/events")
    told = list[Any]()
    bench.router.kv_events.know = lambda *found: told.append(found)
    await peers.read(bench.router.open(dataclasses.replace(bench.request(), salt=b"tenant")))
    assert not told
    await peers.read(bench.router.open(bench.request()))
    assert len(told) == 2, "at the first token, and at the end"


@pytest.mark.parametrize(
    "fields", [{"kv_events_endpoint": "localhost:5557"}, {"kv_events_endpoint": "tcp://*"}, {"kv_events_replay_endpoint": "ipc:///tmp/x"}]
)
def test_an_endpoint_that_is_none_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="kv_events"):
        ClusterConfig.load(None, {f"proxy.{name}": value for name, value in fields.items()})


async def test_an_endpoint_that_cannot_be_bound_is_told(tmp_path: Path, make_bench: Any) -> None:
    bench = await make_bench(kv_events_endpoint=f"ipc://{tmp_path}/no/such/folder")
    with pytest.raises(ConfigError, match="can't be bound"):
        bench.router.kv_events.start()
