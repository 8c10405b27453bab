"""StoreServer by itself: addresses, metrics, load, configuration that can't work."""

from __future__ import annotations

import asyncio
import dataclasses
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.config import StoreConfig
from halfmoon.protocol.errors import ConfigError, InvalidRequest, SchemaMismatch, WorkerLost
from halfmoon.protocol.metrics import IDENTITY_LABELS
from halfmoon.protocol.v1 import common_pb2, kvstore_pb2
from halfmoon.tests.listening import listening_sockets
from halfmoon.tests.waiting import until


async def scrape(address: str) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics") as reply:
            return reply.read().decode()

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            own = ",".join(f'{name}="{value}"' for name, value in sample.labels.items() if name not in IDENTITY_LABELS)
            found[f"{sample.name}{{{own}}}" if own else sample.name] = sample.value
            assert (sample.labels["worker"].startswith("store-"), sample.labels["role"], sample.labels["model_name"]) == (
                True,
                "store",
                "tiny",
            )
    return found


async def test_metrics_show_what_the_lease_manager_counts(kv, store, attach_to) -> None:
    address = store.serve_metrics("127.0.0.1", "tiny")
    client = await attach_to(store.address, "prefill-0")
    await kv.cache(client, "a", 8)
    await kv.hand_off(client, "r1", 3)
    await client.reserve("r2", 1, [], 1, 30)
    await client.abort("r2", 1, WorkerLost("gone"))
    found = await scrape(address)
    size = kv.schema.block_bytes
    by_state = [found[f'halfmoon_store_arena_bytes{{state="{state}"}}'] for state in ("leased", "cached", "free")]
    assert sum(by_state) == 8 * size == found["halfmoon_store_arena_capacity_bytes"] and by_state[0] >= 3 * size
    assert found["halfmoon_store_evicted_blocks_total"] == 4
    assert found['halfmoon_store_aborted_handoffs_total{reason="worker_lost"}'] == 1
    assert found["halfmoon_store_handoffs"] == 1 and found["halfmoon_store_sessions"] == 1
    assert found["halfmoon_store_expired_leases_total"] == 0


async def test_load_is_the_share_of_the_arena_in_use(kv, store, attach_to) -> None:
    assert store.load() == (0, 0, 0, 0.0, 0.0, 0, 0)
    client = await attach_to(store.address, "prefill-0")
    await kv.cache(client, "a", 2)
    await client.reserve("r1", 1, kv.keys("r1", 2), 2, 30)
    assert store.load() == (1, 1, 1, 0.5, 0.25, 0, 0)  # without an SSD tier
    assert store.accounting() == (8, 2, 2, 4)


async def test_a_store_that_was_given_its_schema_refuses_others_from_the_first(kv, start_store, attach_to) -> None:
    store = await start_store(schema=kv.schema)
    assert store.accounting() == (8, 0, 0, 8)
    with pytest.raises(SchemaMismatch, match="num_layers"):
        await attach_to(store.address, "c", schema=dataclasses.replace(kv.schema, num_layers=9))


async def test_an_arena_that_holds_no_block_is_told_to_the_first_client(kv, start_store, attach_to) -> None:
    store = await start_store(num_slots=1)
    with pytest.raises(ConfigError, match="raise it"):
        await attach_to(store.address, "c", schema=dataclasses.replace(kv.schema, num_layers=9))
    await attach_to(store.address, "c")


async def test_an_arena_that_does_not_fit_the_machine_is_refused_at_start_and_the_port_is_free_again() -> None:
    before = listening_sockets()
    server = StoreServer(StoreConfig(arena_bytes=2**50), node_id="n")
    with pytest.raises(ConfigError, match="no room for an arena"):
        await server.start("127.0.0.1")
    await until(lambda: listening_sockets() == before)


async def test_a_taken_port_is_an_error_that_names_it(store) -> None:
    port = int(store.address.rpartition(":")[2])
    with pytest.raises((OSError, RuntimeError), match=str(port)):
        await StoreServer(StoreConfig(arena_bytes=2**20), node_id="n").start("127.0.0.1", port)


async def test_a_stopped_server_may_be_stopped_again_and_says_that_it_does_not_run(kv) -> None:
    server = StoreServer(StoreConfig(arena_bytes=2**20), node_id="n", schema=kv.schema)
    await server.start("127.0.0.1")
    await server.stop(0)
    await server.stop(0)
    with pytest.raises(RuntimeError, match="start it first"):
        server.accounting()


async def test_a_schema_without_a_size_is_refused(kv, store, attach_to) -> None:
    with pytest.raises(InvalidRequest, match="blocks have no size"):
        await attach_to(store.address, "c", schema=dataclasses.replace(kv.schema, num_layers=0))
    await attach_to(store.address, "c")


@pytest.mark.parametrize("fields_json", ["{", "[]", "7", '{"message": "x"}', "[" * 100_000])
async def test_a_reason_that_is_none_is_the_callers_fault(store, attach_to, fields_json, caplog) -> None:
    client = await attach_to(store.address, "prefill-0")
    reason = common_pb2.Error(code="worker_lost", message="gone", fields_json=fields_json)
    request = kvstore_pb2.AbortRequest(handoff=common_pb2.HandoffId(id="r", epoch=1), reason=reason)
    with pytest.raises(InvalidRequest, match="fields_json"):
        await client._connection.call(client._connection.stub.Abort, request)
    assert [record for record in caplog.records if record.exc_info] == []
