"""Members that join, report, restart and leave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.errors import InvalidRequest, SchemaMismatch
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.members.member import Member
from halfmoon.proxy.metrics import ProxyMetrics

SCHEMA = KVSchema(model_fingerprint="m", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
ROLES = {"prefill": control_pb2.ROLE_PREFILL, "decode": control_pb2.ROLE_DECODE, "store": control_pb2.ROLE_STORE}
NO_LOAD = control_pb2.MemberLoad()


def info(member_id: str, incarnation: int = 1, schema: KVSchema = SCHEMA, max_model_len: int = 512) -> control_pb2.MemberInfo:
    role, number = member_id.split("-")
    return control_pb2.MemberInfo(
        id=member_id,
        incarnation=f"{member_id}.{incarnation}",
        role=ROLES[role],
        address=f"127.0.0.1:{len(role)}{number}{incarnation}" if role != "store" else f"127.0.0.1:1{number}",
        store_address=f"127.0.0.1:1{number}",
        schema=None if role == "store" else schema.to_proto(),
        max_model_len=max_model_len,
    )


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    found = Cluster(ProxyMetrics(CollectorRegistry()))
    yield found
    await found.close()


def ids(cluster: Cluster) -> tuple[list[str], list[str]]:
    snapshot = cluster.snapshot(4)
    return [member.id for member in snapshot.prefill], [member.id for member in snapshot.decode]


async def test_only_workers_whose_own_store_is_alive_are_candidates(cluster: Cluster) -> None:
    cluster.join(info("prefill-0"), NO_LOAD)
    cluster.join(info("decode-1"), NO_LOAD)
    cluster.join(info("decode-0"), NO_LOAD)
    assert ids(cluster) == ([], [])
    store = cluster.join(info("store-0"), NO_LOAD)
    assert ids(cluster) == (["prefill-0"], ["decode-0"])
    cluster.join(info("store-1"), NO_LOAD)
    assert ids(cluster) == (["prefill-0"], ["decode-0", "decode-1"])
    cluster.leave(store, store.stream)
    assert ids(cluster) == ([], ["decode-1"])


async def test_another_kv_format_is_refused_with_both_sides_printed(cluster: Cluster) -> None:
    cluster.join(info("prefill-0"), NO_LOAD)
    other = KVSchema(model_fingerprint="m", dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
    with pytest.raises(SchemaMismatch, match=r"dtype: the cluster has .*float32.*decode-0.*bfloat16"):
        cluster.join(info("decode-0", schema=other), NO_LOAD)
    assert list(cluster.members) == ["prefill-0"] and cluster.schema == SCHEMA


async def test_the_format_is_the_first_worker_s_for_as_long_as_there_is_one(cluster: Cluster) -> None:
    other = KVSchema(model_fingerprint="n", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
    assert cluster.schema is None
    member = cluster.join(info("prefill-0"), NO_LOAD)
    cluster.leave(member, member.stream)
    cluster.join(info("prefill-0", 2, schema=other), NO_LOAD)
    assert cluster.schema == other
    given = Cluster(ProxyMetrics(CollectorRegistry()), SCHEMA)
    with pytest.raises(SchemaMismatch):
        given.join(info("prefill-0", schema=other), NO_LOAD)


async def test_a_new_process_replaces_the_old_and_the_old_cannot_come_back(cluster: Cluster) -> None:
    old = cluster.join(info("decode-0", 1), NO_LOAD)
    gone: list[Member] = []
    old.on_gone(gone.append)
    new = cluster.join(info("decode-0", 2), NO_LOAD)
    assert gone == [old] and old.gone and cluster.members["decode-0"] is new
    cluster.leave(old, old.stream)
    assert cluster.members["decode-0"] is new, "the old stream's end is not the new process's"
    with pytest.raises(InvalidRequest, match="replaced by a newer process"):
        cluster.join(info("decode-0", 1), NO_LOAD)


async def test_a_second_stream_of_the_same_process_takes_over_without_a_loss(cluster: Cluster) -> None:
    member = cluster.join(info("decode-0"), NO_LOAD)
    first = member.stream
    assignment = member.assigned.place(10)
    assert cluster.join(info("decode-0"), NO_LOAD) is member
    cluster.leave(member, first)
    assert not member.gone and member.assigned.num_tokens == 10
    assignment.end()
    cluster.leave(member, member.stream)
    assert member.gone and not cluster.members


async def test_observers_hear_of_an_end_once_unless_they_left(cluster: Cluster) -> None:
    member = cluster.join(info("prefill-0"), NO_LOAD)
    heard: list[str] = []
    member.on_gone(lambda found: heard.append(f"one {found.id}"))
    unwatch = member.on_gone(lambda found: heard.append("two"))
    unwatch()
    unwatch()
    cluster.leave(member, member.stream)
    cluster.leave(member, member.stream)
    assert heard == ["one prefill-0"]


async def test_prefill_load_follows_reports_and_decode_load_the_books(cluster: Cluster) -> None:
    prefill = cluster.join(info("prefill-0"), NO_LOAD)
    decode = cluster.join(info("decode-0"), NO_LOAD)
    prefill.assigned.place(1000)
    decode.assigned.place(1000)
    for member in (prefill, decode):
        for _ in range(2):
            member.report(control_pb2.MemberLoad(num_outstanding_tokens=300))
    assert prefill.state.num_outstanding_tokens == 300
    assert decode.state.num_outstanding_tokens == 1000, "a hand-off that decode still waits for is load too"


async def test_max_model_len_is_what_every_worker_takes(cluster: Cluster) -> None:
    assert cluster.max_model_len == 0
    cluster.join(info("prefill-0", max_model_len=512), NO_LOAD)
    cluster.join(info("decode-0", max_model_len=256), NO_LOAD)
    assert cluster.max_model_len == 256


def without_schema() -> control_pb2.MemberInfo:
    found = info("prefill-0")
    found.ClearField("schema")
    return found


def without_incarnation() -> control_pb2.MemberInfo:
    found = info("prefill-0")
    found.incarnation = ""
    return found


@pytest.mark.parametrize("make", [control_pb2.MemberInfo, without_schema, without_incarnation])
async def test_an_incomplete_info_is_refused(cluster: Cluster, make: Callable[[], control_pb2.MemberInfo]) -> None:
    with pytest.raises(InvalidRequest):
        cluster.join(make(), NO_LOAD)
    assert not cluster.members
