"""How a worker or a store belongs to the cluster: a stream to the proxy, held open for as long as it lives.

member ── Join(info, role) ─► proxy  the proxy now places requests on it
member ── Join(load) ─► proxy        every report_interval_s
member ◄── order: a role ── proxy    taken on or refused ── answer ─► proxy, at once
member ── (stream ends) ─► proxy     it is gone, at once: killed, left, or cut off
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc.aio

from .channel import open_channel
from .errors import HalfmoonError, InvalidRequest
from .grpc_errors import error_to_proto
from .v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.2
REJOIN_INTERVAL_S = 0.5


class _Membership:
    """One member's side. The role outlives a stream, the answers do not: who asked is gone with it."""

    def __init__(
        self,
        info: control_pb2.MemberInfo,
        load: Callable[[], control_pb2.MemberLoad],
        take_role: Callable[[control_pb2.Role], None] | None,
    ) -> None:
        self._info = info
        self._load = load
        self._take_role = take_role
        self._role = info.role
        self._answers: asyncio.Queue[control_pb2.OrderAnswer] = asyncio.Queue()

    async def reports(self) -> AsyncIterator[control_pb2.MemberReport]:
        """Of a new stream."""
        answers = self._answers = asyncio.Queue()
        yield control_pb2.MemberReport(info=self._info, load=self._load(), role=self._role)
        while True:
            answer = None
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    answer = await answers.get()
            except TimeoutError:
                pass  # the time of a report in turn
            yield control_pb2.MemberReport(load=self._load(), role=self._role, answer=answer)

    def obey(self, order: control_pb2.MemberOrder) -> None:
        answer = control_pb2.OrderAnswer(number=order.number)
        try:
            if self._take_role is None:
                raise InvalidRequest(f"{self._info.id} has one role for good; order workers alone")
            self._take_role(order.role)
            self._role = order.role
        except HalfmoonError as error:
            logger.warning("%s refuses order %d: %s", self._info.id, order.number, error)
            answer.refusal.CopyFrom(error_to_proto(error))
        self._answers.put_nowait(answer)


async def stay_joined(
    proxy_address: str,
    info: control_pb2.MemberInfo,
    load: Callable[[], control_pb2.MemberLoad],
    on_joined: Callable[[], None] = lambda: None,
    take_role: Callable[[control_pb2.Role], None] | None = None,
) -> None:
    """Joins and reports until cancelled; joins again whenever the proxy comes back.

    Args:
        take_role: called with a role that the proxy orders; what HalfmoonError it raises is the refusal. None: all are refused.
    """
    membership = _Membership(info, load, take_role)
    async with open_channel(proxy_address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        while True:
            try:
                async for order in stub.Join(membership.reports(), wait_for_ready=True):
                    if order.accepted:
                        logger.info("%s joined the proxy at %s", info.id, proxy_address)
                        on_joined()
                    if order.number:
                        membership.obey(order)
                logger.warning("the proxy at %s ended the stream; joining again", proxy_address)
            except grpc.aio.AioRpcError as error:
                logger.warning("the proxy at %s is gone (%s); joining again", proxy_address, error.code().name)
            await asyncio.sleep(REJOIN_INTERVAL_S)
