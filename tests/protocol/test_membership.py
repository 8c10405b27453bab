"""A member's side of its Join stream, against a scripted proxy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from halfmoon.protocol.channel import create_server
from halfmoon.protocol.errors import InvalidRequest, SchemaMismatch
from halfmoon.protocol.grpc_errors import unary_boundary
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.v1 import control_pb2, control_pb2_grpc
from halfmoon.tests.waiting import until

INFO = control_pb2.MemberInfo(id="decode-0", incarnation="1")


class Proxy(control_pb2_grpc.ControlServicer):
    """Refuses every Join, or ends it at once, or takes its reports."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.ends_at_once = False
        self.num_joins = 0
        self.reports: list[control_pb2.MemberReport] = []
        self.reported = asyncio.Event()
        self.end = asyncio.Event()  # the next report ends its stream

    @unary_boundary
    async def Join(self, reports: AsyncIterator[control_pb2.MemberReport], context: grpc.aio.ServicerContext) -> None:
        self.num_joins += 1
        if self.refusal is not None:
            raise self.refusal
        if self.ends_at_once:
            return
        await context.write(control_pb2.MemberOrder(accepted=True))
        async for report in reports:
            self.reports.append(report)
            self.reported.set()
            if self.end.is_set():
                self.end.clear()
                return


@pytest.fixture
async def proxy() -> AsyncIterator[tuple[Proxy, str]]:
    servicer = Proxy()
    server, port = create_server("127.0.0.1", 0)
    control_pb2_grpc.add_ControlServicer_to_server(servicer, server)
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0.0)


@pytest.mark.parametrize(
    "refusal",
    [
        SchemaMismatch("num_layers: 2 here, 99 there", differing={"num_layers": [2, 99]}),
        InvalidRequest("decode-0 has been replaced by a newer process; end this one"),
    ],
)
async def test_a_refusal_is_raised_in_the_proxys_words_and_not_tried_again(proxy: Any, refusal: Any) -> None:
    servicer, address = proxy
    servicer.refusal = refusal
    with pytest.raises(type(refusal)) as caught:
        await stay_joined(address, INFO, control_pb2.MemberLoad)
    assert (caught.value.message, caught.value.fields, servicer.num_joins) == (refusal.message, refusal.fields, 1)


async def test_a_bug_in_what_tells_the_load_is_raised_and_not_swallowed(proxy: Any) -> None:
    def load() -> control_pb2.MemberLoad:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        await stay_joined(proxy[1], INFO, load)


async def test_a_broken_member_says_what_it_computed_and_leaves(proxy: Any) -> None:
    servicer, address = proxy
    broken: asyncio.Future[control_pb2.Broken] = asyncio.get_running_loop().create_future()
    joined = asyncio.create_task(stay_joined(address, INFO, control_pb2.MemberLoad, broken=broken))
    await servicer.reported.wait()
    broken.set_result(control_pb2.Broken(reason="the context is gone", request_ids=["a", "b"]))
    async with asyncio.timeout(60):
        await joined
    assert servicer.reports[-1].broken == control_pb2.Broken(reason="the context is gone", request_ids=["a", "b"])
    assert not any(report.HasField("broken") for report in servicer.reports[:-1])


async def test_what_is_wrong_again_and_again_is_logged_once(
    proxy: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, address = proxy
    servicer.ends_at_once = True
    monkeypatch.setattr("halfmoon.protocol.membership.REJOIN_INTERVAL_S", 0.01)
    with caplog.at_level(logging.WARNING):
        joined = asyncio.create_task(stay_joined(address, INFO, control_pb2.MemberLoad))
        await until(lambda: servicer.num_joins > 5)
        joined.cancel()
        await asyncio.wait({joined})
    assert [record.getMessage() for record in caplog.records] == [f"decode-0: the proxy at {address} ended the stream; joining again"]


async def test_a_member_hears_of_each_end_of_a_stream_on_which_it_was_accepted(proxy: tuple[Proxy, str]) -> None:
    servicer, address = proxy
    heard: list[str] = []
    again = asyncio.Event()

    def joined() -> None:
        heard.append("joined")
        if len(heard) == 3:
            again.set()

    member = asyncio.create_task(stay_joined(address, INFO, control_pb2.MemberLoad, joined, on_left=lambda: heard.append("left")))
    await asyncio.wait_for(servicer.reported.wait(), 60)
    servicer.end.set()
    await asyncio.wait_for(again.wait(), 60)
    assert heard == ["joined", "left", "joined"]
    member.cancel()
    await asyncio.gather(member, return_exceptions=True)
