"""Orders to a member, on its Join stream, and its answers.

role ─► order, with a number ─► member ─► answer ─► its role now | refusal        the stream ends ─► WorkerLost
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc.aio

from ...protocol.errors import HalfmoonError, WorkerLost
from ...protocol.grpc_errors import client_left, error_from_proto
from ...protocol.v1 import control_pb2

Write = Callable[[control_pb2.MemberOrder], Awaitable[None]]


class Titled(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def title(self) -> str: ...


class Orders:
    """The orders to one member. one_at_a_time: held by the giver of an order until it has been obeyed or undone."""

    def __init__(self, member: Titled) -> None:
        self.one_at_a_time = asyncio.Lock()
        self._member = member
        self._numbers = itertools.count(1)
        self._write: Write | None = None
        self._writing = asyncio.Lock()
        self._unanswered: dict[int, asyncio.Future[control_pb2.Role]] = {}

    @property
    def pending(self) -> bool:
        """An order or its answer is on its way."""
        return bool(self._unanswered)

    async def open(self, write: Write, accepted: control_pb2.MemberOrder) -> None:
        """Makes a stream the present one, and sends the first order on it. Others follow, and those on an older stream fail."""
        self._fail_all()
        self._write = write
        await self._send(write, accepted)

    def closed(self) -> None:
        self._write = None
        self._fail_all()

    async def give(self, order: control_pb2.MemberOrder) -> control_pb2.Role:
        """Returns the role that the member says it has once it has obeyed. Raises its refusal, or WorkerLost if its stream ends first."""
        write = self._write
        if write is None:
            raise self._lost()
        order.number = next(self._numbers)
        answered = self._unanswered[order.number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(write, order)
            return await answered
        except grpc.aio.AioRpcError as error:
            raise self._lost() from error
        except asyncio.InvalidStateError as error:  # grpc.aio's error for a write on a call that is over
            raise self._lost() from error
        finally:
            self._unanswered.pop(order.number, None)

    def answered(self, answer: control_pb2.OrderAnswer, role: control_pb2.Role = control_pb2.ROLE_UNSPECIFIED) -> None:
        """role: that the member says it has. Drops an answer that nobody waits for."""
        future = self._unanswered.get(answer.number)
        if future is None or future.done():
            return
        if answer.HasField("refusal"):
            future.set_exception(error_from_proto(answer.refusal))
        else:
            future.set_result(role)

    async def tell(self, order: control_pb2.MemberOrder) -> None:
        """Without an answer. Nothing happens where its stream has ended."""
        if self._write is None:
            return
        try:
            await self._send(self._write, order)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):  # the stream's end says so itself
            return
        except grpc.aio.InternalError as error:
            if not client_left(error):
                raise

    async def _send(self, write: Write, order: control_pb2.MemberOrder) -> None:
        async with self._writing:  # a stream takes one message at a time
            await write(order)

    def _fail_all(self) -> None:
        for future in self._unanswered.values():
            if not future.done():
                future.set_exception(self._lost())

    def _lost(self) -> HalfmoonError:
        return WorkerLost(f"{self._member.title} is gone: its stream ended before it answered", worker=self._member.id)
