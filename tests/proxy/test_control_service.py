"""Control over a real listener: Join, Status, Drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.errors import InvalidRequest, SchemaMismatch
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc


@pytest.fixture
async def control(bench: Any) -> AsyncIterator[Any]:
    async with open_channel(bench.address) as channel:
        yield control_pb2_grpc.ControlStub(channel)


async def refusal(control: Any, *reports: control_pb2.MemberReport) -> Exception:
    async def stream() -> AsyncIterator[control_pb2.MemberReport]:
        for report in reports:
            yield report

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in control.Join(stream()):
            pass
    return from_rpc_error(caught.value, "proxy")


async def test_status_shows_members_requests_and_percentiles(bench: Any, peers: Any, control: Any) -> None:
    bench.prefills[0].load.num_outstanding_tokens = 77
    await peers.read(bench.router.open(bench.request()))
    bench.decodes[0].before_token = peers.forever
    waiting = bench.router.open(bench.request())
    while (status := await control.Status(control_pb2.StatusRequest())).members[0].load.num_outstanding_tokens != 77:
        await asyncio.sleep(0.02)
    assert [member.info.id for member in status.members] == ["prefill-0", "decode-0", "store-0"]
    assert set((await control.MemberIds(control_pb2.MemberIdsRequest())).ids) == {"prefill-0", "decode-0", "store-0"}
    assert status.members[0].info == bench.prefills[0].info and 0 < status.members[0].up_s <= status.up_s
    assert (status.model, status.num_queued, status.num_running, status.draining) == ("test-model", 1, 0, False)
    assert status.ttft_s.count == status.tpot_s.count == 1 and status.ttft_s.p50 > 0
    assert dict(status.outcomes) == {"done": 1}
    await waiting.cancel("done with it")


async def test_drain_stops_admission_and_counts_who_is_left(bench: Any, peers: Any, control: Any) -> None:
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(bench.request())
    assert (await control.Drain(control_pb2.DrainRequest(timeout_s=0.05))).num_left == 1
    assert (await control.Status(control_pb2.StatusRequest())).draining
    await stream.cancel("done with it")
    assert (await control.Drain(control_pb2.DrainRequest(timeout_s=5))).num_left == 0


async def test_a_member_with_another_kv_format_is_refused_on_its_stream(bench: Any, peers: Any, control: Any) -> None:
    info = control_pb2.MemberInfo()
    info.CopyFrom(bench.decodes[0].info)
    info.id, info.incarnation, info.schema.num_layers = "decode-9", "9", 99
    error = await refusal(control, control_pb2.MemberReport(info=info))
    assert isinstance(error, SchemaMismatch) and error.fields == {"differing": {"num_layers": [2, 99]}}
    assert "decode-9" not in bench.cluster.members
    (absent,) = (await control.Status(control_pb2.StatusRequest())).absences
    assert absent.info.id == "decode-9" and absent.why.startswith("refused: KV formats differ in num_layers")


async def test_status_names_who_left_and_why_until_it_is_back(bench: Any, control: Any) -> None:
    lost = bench.cluster.members["decode-0"]
    assert not (await control.Status(control_pb2.StatusRequest())).absences
    gone = asyncio.Event()
    lost.on_gone(lambda _: gone.set())
    await bench.decodes[0].kill()
    await asyncio.wait_for(gone.wait(), 60)
    (absent,) = (await control.Status(control_pb2.StatusRequest())).absences
    assert (absent.info, absent.why) == (bench.decodes[0].info, "it left the cluster") and absent.for_s >= 0
    await bench.join(bench.decodes[0])
    status = await control.Status(control_pb2.StatusRequest())
    assert not status.absences and "decode-0" in [member.info.id for member in status.members]


async def test_a_live_member_is_not_absent_because_its_old_process_was_refused(bench: Any, control: Any) -> None:
    info = control_pb2.MemberInfo()
    info.CopyFrom(bench.decodes[0].info)
    info.incarnation, info.schema.num_layers = "older", 99
    assert isinstance(await refusal(control, control_pb2.MemberReport(info=info)), SchemaMismatch)
    assert not (await control.Status(control_pb2.StatusRequest())).absences


async def test_a_stream_that_does_not_say_who_it_is_is_refused(bench: Any, control: Any) -> None:
    assert isinstance(await refusal(control, control_pb2.MemberReport()), InvalidRequest)
    assert isinstance(await refusal(control), InvalidRequest)


async def test_the_end_of_a_join_stream_is_the_member_s_end(bench: Any) -> None:
    assert bench.sample("halfmoon_members", role="decode") == 1
    await bench.decodes[0].leave()
    async with asyncio.timeout(60):
        while "decode-0" in bench.cluster.members:
            await asyncio.sleep(0.01)
    assert bench.sample("halfmoon_members", role="decode") == 0


async def test_the_stream_of_a_replaced_process_ends(bench: Any, control: Any) -> None:
    newer = control_pb2.MemberInfo()
    newer.CopyFrom(bench.decodes[0].info)
    newer.incarnation = "newer"
    held = asyncio.Event()

    async def stream() -> AsyncIterator[control_pb2.MemberReport]:
        yield control_pb2.MemberReport(info=newer)
        await held.wait()

    call = control.Join(stream())
    assert (await call.read()).accepted
    assert bench.cluster.members["decode-0"].incarnation == "newer"
    await asyncio.sleep(0.5)  # the old process reports, is sent away, and tries to join again
    assert bench.cluster.members["decode-0"].incarnation == "newer"
    held.set()
    call.cancel()
