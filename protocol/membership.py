"""How a worker or a store belongs to the cluster: a stream to the proxy, held open for as long as it lives.

member ── Join(info) ─► proxy        the proxy now places requests on it
member ── Join(load) ─► proxy        every report_interval_s
member ── (stream ends) ─► proxy     it is gone, at once: killed, left, or cut off
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc.aio

from .channel import open_channel
from .v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.2
REJOIN_INTERVAL_S = 0.5


async def stay_joined(
    proxy_address: str,
    info: control_pb2.MemberInfo,
    load: Callable[[], control_pb2.MemberLoad],
    on_joined: Callable[[], None] = lambda: None,
) -> None:
    """Joins and reports until cancelled; joins again whenever the proxy comes back."""

    async def reports() -> AsyncIterator[control_pb2.MemberReport]:
        yield control_pb2.MemberReport(info=info, load=load())
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            yield control_pb2.MemberReport(load=load())

    async with open_channel(proxy_address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        while True:
            try:
                async for _ in stub.Join(reports(), wait_for_ready=True):
                    logger.info("%s joined the proxy at %s", info.id, proxy_address)
                    on_joined()
                logger.warning("the proxy at %s ended the stream; joining again", proxy_address)
            except grpc.aio.AioRpcError as error:
                logger.warning("the proxy at %s is gone (%s); joining again", proxy_address, error.code().name)
            await asyncio.sleep(REJOIN_INTERVAL_S)
