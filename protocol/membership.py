"""How a worker or a store belongs to the cluster: a stream to the proxy, held open for as long as it lives.

member ── Join(info, role) ─► proxy  the proxy now places requests on it, or refuses it: that ends the member
member ── Join(load) ─► proxy        every report_interval_s; of a worker with the blocks that came to its pages and went
member ◄── order: a role ── proxy    taken on or refused ── answer ─► proxy, at once
member ── Join(broken) ─► proxy      it broke, and what it computed then; the stream ends behind it
member ── (stream ends) ─► proxy     it is gone, at once: killed, left, or cut off
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc.aio

from .channel import open_channel
from .credentials import Credentials
from .errors import HalfmoonError, InvalidRequest, SchemaMismatch, WorkerLost
from .grpc_errors import error_to_proto, from_rpc_error
from .v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.2
REJOIN_INTERVAL_S = 0.5

Broken = asyncio.Future[control_pb2.Broken]
"""Set once the member is broken."""


class PrefixFeed(Protocol):
    """What can be found in a worker's pages."""

    def restart(self) -> None:
        """The next take begins with the whole."""
        ...

    def take(self) -> control_pb2.PrefixChange | None: ...


class _Membership:
    """One member's side. The role outlives a stream, the answers do not: who asked is gone with it."""

    def __init__(
        self,
        info: control_pb2.MemberInfo,
        load: Callable[[], control_pb2.MemberLoad],
        take_role: Callable[[control_pb2.Role], None] | None,
        broken: Broken | None,
        prefixes: PrefixFeed | None,
    ) -> None:
        self.bug: Exception | None = None  # of load
        self._prefixes = prefixes
        self._info = info
        self._load = load
        self._take_role = take_role
        self._broken = broken
        self._role = info.role
        self._answers: asyncio.Queue[control_pb2.OrderAnswer | None] = asyncio.Queue()
        if broken is not None:
            broken.add_done_callback(lambda _: self._answers.put_nowait(None))

    @property
    def has_left(self) -> bool:
        return self._broken is not None and self._broken.done()

    async def reports(self) -> AsyncIterator[control_pb2.MemberReport]:
        """Of a new stream, which ends with them."""
        try:
            async for report in self._reports():
                yield report
        except Exception as bug:  # grpc.aio would cancel the call, and say nothing
            self.bug = bug

    async def _reports(self) -> AsyncIterator[control_pb2.MemberReport]:
        answers = self._answers = asyncio.Queue()
        if self._prefixes is not None:
            self._prefixes.restart()
        yield self._report(info=self._info)
        while self._broken is None or not self._broken.done():
            answer = None
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    answer = await answers.get()
            except TimeoutError:
                pass  # the time of a report in turn
            if not self.has_left:
                yield self._report(answer=answer)
        yield control_pb2.MemberReport(role=self._role, broken=self._broken.result())

    def _report(
        self, info: control_pb2.MemberInfo | None = None, answer: control_pb2.OrderAnswer | None = None
    ) -> control_pb2.MemberReport:
        prefixes = self._prefixes.take() if self._prefixes is not None else None
        return control_pb2.MemberReport(info=info, load=self._load(), role=self._role, answer=answer, prefixes=prefixes)

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
    broken: Broken | None = None,
    prefixes: PrefixFeed | None = None,
    on_left: Callable[[], None] = lambda: None,
    credentials: Credentials | None = None,
    on_stores: Callable[[list[str]], None] = lambda addresses: None,
) -> None:
    """Joins and reports until cancelled, or broken and the proxy knows; joins again whenever the proxy comes back.

    Args:
        take_role: called with a role that the proxy orders; what HalfmoonError it raises is the refusal. None: all are refused.
        broken: once it is set, it is reported, and the member leaves.
        prefixes: told to the proxy with the reports; None: there are none to tell of.
        on_left: called whenever a stream on which the member was accepted has ended: the proxy has forgotten it, or is gone.
        credentials: that the proxy asks for.
        on_stores: called with the addresses of the cluster's live stores, where the member is a store and whenever they change.

    Raises what the proxy refuses the member for: InvalidRequest (a newer process has its id, say), SchemaMismatch, WorkerLost (it makes no
    progress). And what load raises.
    """
    membership = _Membership(info, load, take_role, broken, prefixes)
    told = ""  # what is wrong is said once, however often it is tried
    async with open_channel(proxy_address, credentials) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        while not membership.has_left:
            accepted = False
            try:
                async for order in stub.Join(membership.reports(), wait_for_ready=True):
                    if order.accepted:
                        told, accepted = "", True
                        logger.info("%s joined the proxy at %s", info.id, proxy_address)
                        on_joined()
                    if order.HasField("stores"):
                        on_stores(list(order.stores.addresses))
                    if order.number:
                        membership.obey(order)
                    if order.tell_prefixes and prefixes is not None:
                        prefixes.restart()
                found = f"the proxy at {proxy_address} ended the stream"
            except grpc.aio.AioRpcError as error:
                refusal = from_rpc_error(error, f"the proxy at {proxy_address}")
                if isinstance(refusal, (InvalidRequest, SchemaMismatch, WorkerLost)):
                    raise refusal from None
                found = refusal.message
            if accepted:
                on_left()
            if membership.bug is not None:
                raise membership.bug
            if membership.has_left:
                return
            if found != told:
                told = found
                logger.warning("%s: %s; joining again", info.id, found)
            await asyncio.sleep(REJOIN_INTERVAL_S)
