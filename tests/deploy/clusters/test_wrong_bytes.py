"""The demo's own check fails when KV bytes are altered on their way. Right answers on a sound cluster: test_one_node.py."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from halfmoon.deploy.demo import converse
from halfmoon.protocol.errors import HandoffCorrupt

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


async def test_altered_kv_bytes_make_the_demo_fail(cluster) -> None:
    prefill = [member.actor for member in cluster.supervisor.members if member.role == "prefill"]
    await asyncio.gather(*(actor.flip_pushed_bytes.remote() for actor in prefill))
    try:
        with pytest.raises(HandoffCorrupt, match=r"checksum|match"):
            await converse(cluster.supervisor.grpc_address, Console(file=io.StringIO()))
    finally:
        await cluster.restart("store-0")  # with it end the sessions that flip, and the blocks of wrong bytes that it keeps
