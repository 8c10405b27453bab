"""Members that join, report, restart and leave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.errors import InvalidRequest, SchemaMismatch
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.timing.step_limits import StepLimits
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.conductor.backlog import QueuePlace
from halfmoon.proxy.conductor.placement import NO_BOUND
from halfmoon.proxy.members.cluster import Asking, Cluster
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


def stores(cluster: Cluster) -> list[str]:
    return [member.store_address for member in cluster.snapshot(4).decode]


def ids(cluster: Cluster) -> tuple[list[str], list[str]]:
    snapshot = cluster.snapshot(4)
    return [member.id for member in snapshot.prefill], [member.id for member in snapshot.decode]


async def test_a_worker_without_its_store_is_a_candidate_that_has_none(cluster: Cluster) -> None:
    cluster.join(info("prefill-0"), NO_LOAD)
    cluster.join(info("decode-1"), NO_LOAD)
    cluster.join(info("decode-0"), NO_LOAD)
    assert ids(cluster) == (["prefill-0"], ["decode-0", "decode-1"])
    assert stores(cluster) == ["", ""] and cluster.snapshot(4).max_handoff_len == 0
    store = cluster.join(info("store-0"), NO_LOAD)
    assert stores(cluster) == ["127.0.0.1:10", ""] and cluster.snapshot(4).max_handoff_len == NO_BOUND
    cluster.join(info("store-1"), NO_LOAD)
    assert stores(cluster) == ["127.0.0.1:10", "127.0.0.1:11"]
    cluster.leave(store, store.stream)
    assert ids(cluster) == (["prefill-0"], ["decode-0", "decode-1"]) and stores(cluster) == ["", "127.0.0.1:11"]
    assert cluster.prefill_stores == [] and cluster.store_loads() == {}


async def test_a_hand_off_lies_in_the_first_store_that_takes_it_else_in_the_emptiest(cluster: Cluster) -> None:
    assert cluster.store_for(1, ["127.0.0.1:10"]) is None
    for number, (capacity, usage_ratio) in enumerate([(100, 0.0), (200, 0.9), (300, 0.5), (0, 0.6)]):
        found = info(f"store-{number}")
        found.kv_capacity_tokens = capacity  # 0: not known
        cluster.join(found, control_pb2.MemberLoad(kv_usage_ratio=usage_ratio))

    def chosen(num_tokens: int, *numbers: int) -> str:
        store = cluster.store_for(num_tokens, [f"127.0.0.1:1{number}" for number in numbers])
        return store.id if store is not None else ""

    assert [chosen(100, 1, 0), chosen(100, 0, 1), chosen(101, 0, 1)] == ["store-1", "store-0", "store-1"]
    assert [chosen(100, 7), chosen(200, 7), chosen(301, 2)] == ["store-0", "store-2", "store-3"]
    cluster.avoid(cluster.members["store-0"], True)
    assert chosen(100, 7) == "store-2"
    assert cluster.max_handoff_len == NO_BOUND
    cluster.leave(cluster.members["store-3"], cluster.members["store-3"].stream)
    assert cluster.max_handoff_len == 300 and chosen(301, 0) == ""


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
    assignment = member.context.place(10)
    assert cluster.join(info("decode-0"), NO_LOAD) is member
    cluster.leave(member, first)
    assert not member.gone and member.context.num_tokens == 10
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


async def test_prefill_load_follows_reports_and_decode_load_what_was_assigned(cluster: Cluster) -> None:
    prefill = cluster.join(info("prefill-0"), NO_LOAD)
    decode = cluster.join(info("decode-0"), NO_LOAD)
    prefill.backlog.assigned.place(1000)
    decode.context.place(1000)
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


async def test_what_is_remembered_of_replaced_processes_is_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfmoon.proxy.members.cluster.NUM_SUPERSEDED", 3)
    for incarnation in range(1, 8):
        cluster.join(info("decode-0", incarnation), NO_LOAD)
    assert list(cluster._superseded) == ["decode-0.4", "decode-0.5", "decode-0.6"]
    with pytest.raises(InvalidRequest, match="replaced by a newer process"):
        cluster.join(info("decode-0", 6), NO_LOAD)


async def test_a_store_is_found_by_its_address_through_joins_and_ends(cluster: Cluster) -> None:
    address = "127.0.0.1:10"
    assert cluster.store_at(address) is None
    old = cluster.join(info("store-0"), NO_LOAD)
    other = info("store-9")
    other.address = address
    new = cluster.join(other, NO_LOAD)
    assert cluster.store_at(address) is old
    cluster.leave(old, old.stream)
    assert cluster.store_at(address) is new and set(cluster.store_addresses) == {address}
    cluster.leave(new, new.stream)
    assert cluster.store_at(address) is None and not cluster.store_addresses


async def test_a_snapshot_shows_each_worker_s_load_and_how_long_the_request_would_wait_there(cluster: Cluster) -> None:
    for name in ("store-0", "store-1", "prefill-0", "prefill-1", "decode-0"):
        cluster.join(info(name), NO_LOAD)
    first, second, decode = (cluster.members[name] for name in ("prefill-0", "prefill-1", "decode-0"))
    first.backlog.place(1000, 4.0, QueuePlace(0), 50.0)
    second.backlog.place(200, 1.0, QueuePlace(0), 50.0)
    decode.context.place(30).begin()
    before = cluster.snapshot(4, 50.0, Asking({"127.0.0.1:11": 3}, QueuePlace(0), lambda num_held: 2.0 if num_held < 3 else 0.5))
    assert [one.num_outstanding_tokens for one in before.prefill] == [1000, 200]
    # steps are shared: each equal comes before it for as long as it takes itself, which is less where its prefix lies
    assert before.prefill.busy_until_s.tolist() == pytest.approx([52.0, 50.5])
    (seen,) = before.decode
    assert (seen.num_outstanding_tokens, seen.num_requests, seen.num_running, seen.num_running_tokens) == (30, 1, 1, 30)
    assert cluster.store_loads() == {"127.0.0.1:10": 1000, "127.0.0.1:11": 200}
    decode.context.place(12)
    assert before.decode[0].num_outstanding_tokens == 30, "a snapshot stays what it was"
    assert cluster.snapshot(4).decode[0].num_outstanding_tokens == 42 and decode.state.num_outstanding_tokens == 42
    cluster.leave(first, first.stream)
    after = cluster.snapshot(4, 50.25, Asking({}, QueuePlace(1), lambda _: 9.0))
    assert [one.id for one in after.prefill] == ["prefill-1"] and after.prefill.busy_until_s.tolist() == pytest.approx([51.0])


async def test_a_snapshot_shows_the_steps_that_a_worker_says_it_runs(cluster: Cluster) -> None:
    told, silent = info("prefill-0"), info("prefill-1")
    told.step_limits.CopyFrom(control_pb2.StepLimits(max_tokens=512, max_tokens_beside=256, tpot_target_s=0.0))
    cluster.join(told, NO_LOAD)
    cluster.join(silent, NO_LOAD)
    cluster.join(info("decode-0"), NO_LOAD)
    seen = cluster.snapshot(4).prefill
    assert [one.limits for one in seen] == [StepLimits(512, 256, 0.0), StepLimits()]
    assert seen.roster.max_step_tokens.tolist() == [512, 2048] and cluster.members["prefill-0"].state.limits.max_tokens_beside == 256


async def test_two_hundred_members_come_and_go_and_each_has_a_row_of_its_own(cluster: Cluster) -> None:
    for number in range(100):
        cluster.join(info(f"store-{number}"), NO_LOAD)
        cluster.join(info(f"decode-{number}"), NO_LOAD).context.place(number)
    for number in range(0, 100, 2):
        gone = cluster.members[f"decode-{number}"]
        cluster.leave(gone, gone.stream)
    for number in range(0, 100, 4):
        cluster.join(info(f"decode-{number}", 2), NO_LOAD).context.place(1000 + number)
    found = {one.id: one.num_outstanding_tokens for one in cluster.snapshot(4).decode}
    odd = {f"decode-{number}": number for number in range(1, 100, 2)}
    assert found == odd | {f"decode-{number}": 1000 + number for number in range(0, 100, 4)}


async def test_rows_of_members_that_left_are_used_again_without_what_stood_there(cluster: Cluster) -> None:
    cluster.join(info("store-0"), NO_LOAD)
    for incarnation in range(1, 300):
        member = cluster.join(info("prefill-0", incarnation), NO_LOAD)
        member.backlog.place(100, 4.0, QueuePlace(0), 50.0)
    assert cluster._table.size <= 64, "one worker and one store"
    assert len(cluster._table.tasks) == 1
    snapshot = cluster.snapshot(4, 50.0, Asking({}, QueuePlace(0), lambda _: 9.0))
    assert snapshot.prefill.busy_until_s.tolist() == pytest.approx([54.0]) and snapshot.prefill[0].num_outstanding_tokens == 100


async def test_each_change_of_a_worker_s_load_shows_in_the_next_snapshot(cluster: Cluster) -> None:
    cluster.join(info("store-0"), NO_LOAD)
    decode = cluster.join(info("decode-0"), NO_LOAD)
    assignment = decode.context.place(30)

    def seen() -> tuple[int, int, int, int]:
        (one,) = cluster.snapshot(4).decode
        return one.num_outstanding_tokens, one.num_requests, one.num_running, one.num_running_tokens

    assert seen() == (30, 1, 0, 0)
    assignment.begin()
    assert seen() == (30, 1, 1, 30)
    assignment.grow(5)
    assert seen() == (35, 1, 1, 35)
    assignment.end()
    assert seen() == (0, 0, 0, 0)
