"""What a test must not leave behind: an open grpc.aio channel, a running grpc.aio server, a thread that the process would wait for.

Such an object outlives its test in silence. Its pending operations complete in the middle of a later test, and at exit the garbage
collector waits for ever until gRPC's poller has seen the end of the last of them.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from halfmoon.protocol.members_only import MemberChannel

Channel: Any = grpc.aio._channel.Channel
Server: Any = grpc.aio._server.Server
KINDS: dict[type, str] = {
    Channel: "an open grpc.aio channel",
    MemberChannel: "an open channel of a member",
    Server: "a running grpc.aio server",
}
Stacks = weakref.WeakKeyDictionary[Any, list[traceback.FrameSummary]]

SHARED_THREADS = ("asyncio_", "checksums-")  # of the event loop's executor and of kvstore's checksum lanes: the process's, not a test's


class OpenObjects:
    """Remembers every channel that is made and every server that is started in this process."""

    def __init__(self) -> None:
        self._channels: Stacks = weakref.WeakKeyDictionary()
        self._servers: Stacks = weakref.WeakKeyDictionary()
        self._member_channels: Stacks = weakref.WeakKeyDictionary()
        MemberChannel.__init__ = _remembering(MemberChannel.__init__, self._member_channels)
        Channel.__init__ = _remembering(Channel.__init__, self._channels)
        Server.start = _remembering(Server.start, self._servers)

    async def find(self) -> set[Any]:
        """The open ones that belong to the running loop, and the threads that the process would wait for.

        A member's channel is one thing, also when it opens another beneath it because its certificates were renewed.
        """
        loop = asyncio.get_running_loop()
        owners = {vars(one).get(name): one for one in list(self._member_channels) for name in ("_channel", "_before")}
        channels = {one for one in list(self._channels) if one._loop is loop and one.get_state() is not grpc.ChannelConnectivity.SHUTDOWN}
        servers = {one for one in list(self._servers) if one._loop is loop and await one.wait_for_termination(0)}
        threads = {one for one in threading.enumerate() if not one.daemon and not one.name.startswith(SHARED_THREADS)}
        return {owners.get(one, one) for one in channels} | servers | threads

    def describe(self, left: set[Any]) -> str:
        """With the lines that opened each."""
        lines: list[str] = []
        for one in left:
            kind = KINDS.get(type(one), str(one))
            stack = self._channels.get(one) or self._servers.get(one) or self._member_channels.get(one)
            lines.append(f"{kind}\n{''.join(traceback.format_list(stack or []))}")
        return "".join(sorted(lines))


def _remembering(method: Callable[..., Any], stacks: Stacks) -> Callable[..., Any]:
    @functools.wraps(method)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        stacks[self] = traceback.extract_stack(limit=6)[:-1]
        return method(self, *args, **kwargs)

    return remembered


async def cancel_tasks(before: set[asyncio.Task[Any]]) -> None:
    """Ends the loop's tasks that were not there before, as asyncio.run does for a loop of one test."""
    tasks = asyncio.all_tasks() - before - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
