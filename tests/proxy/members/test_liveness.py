"""Members that make no progress although their streams are open: first avoided, then left, and back by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.errors import ConfigError, WorkerLost
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.members.liveness import CHECK_INTERVAL_S, Liveness
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.tests.waiting import until

SCHEMA = KVSchema(model_fingerprint="m", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
ROLES = {"prefill": control_pb2.ROLE_PREFILL, "decode": control_pb2.ROLE_DECODE, "store": control_pb2.ROLE_STORE}
CONFIG = ProxyConfig(avoid_after_s=1.0, leave_after_s=2.5, step_patience=10.0, transfer_limit_s=10.0)


class Watched:
    """A cluster whose members are checked by the test's own clock."""

    def __init__(self) -> None:
        self.cluster = Cluster(ProxyMetrics(CollectorRegistry()))
        for member_id in ("store-0", "store-1", "prefill-0", "prefill-1", "decode-0", "decode-1"):
            role, number = member_id.split("-")
            info = control_pb2.MemberInfo(
                id=member_id,
                incarnation=member_id,
                role=ROLES[role],
                address=f"127.0.0.1:{len(role)}{number}",
                store_address=f"127.0.0.1:{len('store')}{number}",
                schema=None if role == "store" else SCHEMA.to_proto(),
            )
            self.cluster.join(info, control_pb2.MemberLoad())
        self.liveness = Liveness(self.cluster, CONFIG)  # made after they joined: no check runs by itself
        self.now = 50.0
        self.liveness.check(self.now)

    def pass_time(self, seconds: float, *silent: str, **loads: control_pb2.MemberLoad) -> None:
        """Checks and reports in turn; silent members send none. loads: what a member reports from now on ("decode_0")."""
        for _ in range(round(seconds / CHECK_INTERVAL_S)):
            for member in list(self.cluster.members.values()):
                if member.id not in silent:
                    self.cluster.report(member, loads.get(member.id.replace("-", "_"), member.load))
            self.now += CHECK_INTERVAL_S
            self.liveness.check(self.now)

    def candidates(self) -> tuple[list[str], list[str]]:
        snapshot = self.cluster.snapshot(4)
        return [one.id for one in snapshot.prefill], [one.id for one in snapshot.decode]


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    found = Watched()
    yield found
    await found.cluster.close()


async def test_who_reports_stays_for_as_long_as_it_likes(watched: Watched) -> None:
    watched.pass_time(1800.0)
    assert len(watched.cluster.members) == 6 and watched.candidates() == (["prefill-0", "prefill-1"], ["decode-0", "decode-1"])


@pytest.mark.parametrize("silent", ["prefill-0", "decode-0"])
async def test_a_silent_worker_is_avoided_then_left_within_three_seconds(watched: Watched, silent: str) -> None:
    gone: list[Any] = []
    member = watched.cluster.members[silent]
    member.on_gone(gone.append)
    watched.pass_time(0.8, silent)
    assert silent in [*watched.candidates()[0], *watched.candidates()[1]]
    watched.pass_time(0.6, silent)
    assert silent not in [*watched.candidates()[0], *watched.candidates()[1]] and not gone
    watched.pass_time(1.4, silent)
    assert gone == [member] and silent not in watched.cluster.members
    assert "it has not reported for" in str(member.lost("r"))
    assert len(watched.cluster.members) == 5


async def test_a_worker_that_reports_again_is_no_longer_avoided(watched: Watched) -> None:
    watched.pass_time(1.6, "decode-0")
    assert watched.candidates()[1] == ["decode-1"]
    watched.pass_time(0.2)
    assert watched.candidates()[1] == ["decode-0", "decode-1"]


async def test_where_all_of_a_role_are_avoided_none_is(watched: Watched) -> None:
    watched.pass_time(1.6, "decode-0", "decode-1")
    assert watched.candidates()[1] == ["decode-0", "decode-1"]


async def test_a_silent_store_takes_its_workers_out_of_the_choice_until_it_is_left_and_they_go_on_without_it(watched: Watched) -> None:
    watched.pass_time(1.6, "store-0")
    assert watched.candidates() == (["prefill-1"], ["decode-1"])
    watched.pass_time(1.2, "store-0")
    assert "store-0" not in watched.cluster.members
    assert watched.candidates() == (["prefill-0", "prefill-1"], ["decode-0", "decode-1"])
    assert watched.cluster.snapshot(4).decode[0].store_address == ""


async def test_what_the_proxy_itself_slept_through_is_nobody_s_silence(watched: Watched) -> None:
    for _ in range(3):
        watched.now += 60.0
        watched.liveness.check(watched.now)
        watched.pass_time(0.2)
    assert len(watched.cluster.members) == 6


def at_step(age_s: float, expected_s: float = 0.01) -> control_pb2.MemberLoad:
    return control_pb2.MemberLoad(step_age_s=age_s, step_expected_s=expected_s)


@pytest.mark.parametrize(
    ("load", "avoided", "left"),
    [
        (at_step(0.9), False, False),
        (at_step(1.4), True, False),
        (at_step(2.9), True, True),
        (at_step(0.9, expected_s=0.1), False, False),
        (at_step(2.4, expected_s=0.1), True, False),
        (at_step(2.6, expected_s=0.1), True, True),  # as soon as a silent one
        (at_step(2.4, expected_s=0.25), False, False),  # a long prompt's
        (at_step(3.9, expected_s=0.25), True, False),
        (at_step(4.1, expected_s=0.25), True, True),
        (control_pb2.MemberLoad(transfer_age_s=3.9), False, False),
        (control_pb2.MemberLoad(transfer_age_s=4.1), True, False),
        (control_pb2.MemberLoad(transfer_age_s=10.1), True, True),
    ],
)
async def test_a_worker_that_reports_and_does_nothing_is_found_by_its_step(
    watched: Watched, load: control_pb2.MemberLoad, avoided: bool, left: bool
) -> None:
    watched.pass_time(0.2, decode_0=load)
    assert ("decode-0" not in watched.candidates()[1], "decode-0" not in watched.cluster.members) == (avoided, left)


def test_a_member_cannot_be_left_before_it_is_avoided() -> None:
    with pytest.raises(ConfigError, match=r"avoid_after_s is 3 and proxy\.leave_after_s 2"):
        ProxyConfig(avoid_after_s=3.0, leave_after_s=2.0)


# over real streams


async def test_a_stalled_worker_s_requests_run_elsewhere_and_it_is_back_once_its_step_is_over(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2, policy="round_robin")
    for peer in bench.decodes:
        peer.before_token = stuck_at(3, peer, bench)
    request = bench.request()
    token_ids, _ = await asyncio.wait_for(peers.read(bench.router.open(request)), 60)
    assert token_ids == peers.answer(request)
    (stalled,) = [peer for peer in bench.decodes if peer.load.step_age_s]
    await until(stalled.cancelled.is_set)
    assert stalled.id not in bench.cluster.members
    again = bench.request()
    assert (await peers.read(bench.router.open(again)))[0] == peers.answer(again)
    assert stalled.id not in bench.cluster.members, "it asks to join, and is not let in"
    stalled.joined.clear()
    stalled.load = control_pb2.MemberLoad()
    await asyncio.wait_for(stalled.joined.wait(), 60)
    assert bench.cluster.members[stalled.id].incarnation == stalled.info.incarnation
    bench.assert_at_rest()


def stuck_at(index: int, peer: Any, bench: Any) -> Any:
    """The first peer that comes to this token never gets past it, and reports an old step."""

    async def before_token(at: int) -> None:
        if at == index and not any(one.load.step_age_s for one in bench.decodes):
            peer.load = at_step(60.0)
            await asyncio.Event().wait()

    return before_token


async def test_a_worker_that_stays_stalled_is_told_to_end(make_bench: Any) -> None:
    bench = await make_bench(1, 1, restart_after_s=1.0)
    info = control_pb2.MemberInfo()
    info.CopyFrom(bench.decodes[0].info)
    info.id, info.incarnation = "decode-9", "9"

    async def reports() -> AsyncIterator[control_pb2.MemberReport]:
        """As many as it takes and no more: grpc.aio's client may lose the status of a call that it still writes to."""
        yield control_pb2.MemberReport(info=info, load=at_step(60.0))
        num_stalled = 1
        while not bench.router.liveness.gave_up(num_stalled):
            yield control_pb2.MemberReport(load=at_step(60.0))
            num_stalled += 1
        await asyncio.Event().wait()

    async with open_channel(bench.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(60):
                async for _ in control_pb2_grpc.ControlStub(channel).Join(reports()):
                    pass
    error = from_rpc_error(caught.value, "proxy")
    assert isinstance(error, WorkerLost) and "one step for 60.0 s" in error.message
    assert "decode-9" not in bench.cluster.members


async def test_a_frozen_member_that_was_left_finds_its_stream_ended_and_joins_again(make_bench: Any) -> None:
    bench = await make_bench(1, 2)
    member = bench.cluster.members["decode-0"]
    bench.decodes[0].joined.clear()
    bench.cluster.lose(member, "it has not reported for 9.9 s")
    await asyncio.wait_for(bench.decodes[0].joined.wait(), 60)
    assert bench.cluster.members["decode-0"] is not member


async def test_one_check_runs_for_all_members_and_ends_with_them(make_bench: Any) -> None:
    bench = await make_bench(2, 2)
    found = bench.router.liveness
    assert len(found._tasks) == 1
    for peer in bench.peers:
        await peer.leave()
    await until(lambda: not len(found._tasks))
    await bench.decodes[0].kill()
    await bench.join(bench.decodes[0])
    assert len(found._tasks) == 1
