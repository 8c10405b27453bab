"""DecodeActor, as Ray would drive it."""

from __future__ import annotations

import asyncio
from typing import Any

from halfmoon.decode_worker.actor import DecodeActor
from halfmoon.protocol.config import DecodeConfig


async def test_an_actor_runs_from_start_to_stop(make_cluster: Any) -> None:
    cluster = await make_cluster()
    actor = DecodeActor(
        worker_id="decode-1",
        node_id="node-a",
        host="127.0.0.1",
        store_address=cluster.store.address,
        proxy_address=cluster.members.address,
        options=cluster.options,
        config=DecodeConfig(),
    )
    host, _, port = (await actor.start()).rpartition(":")
    assert host == "127.0.0.1" and int(port) > 0
    running = asyncio.create_task(actor.run())
    await asyncio.sleep(0)
    assert not running.done()
    await actor.stop(0.0)
    await running
    await actor.stop(0.0)
