"""PrefillActor, as Ray would drive it."""

from __future__ import annotations

import asyncio
from typing import Any

from halfmoon.prefill_worker.actor import PrefillActor
from halfmoon.protocol.config import PrefillConfig
from halfmoon.protocol.worker_life import WorkerAddress


async def every_progress(actor: Any) -> list[Any]:
    """What somebody who always asks for the next one is told, to the end of the start."""
    seen: list[Any] = []
    while (found := await actor.progress(seen[-1].number if seen else 0)) is not None:
        seen.append(found)
    return seen


async def test_an_actor_runs_from_start_to_stop(make_site: Any, options: Any, proxy_address: str) -> None:
    site = await make_site()
    actor = PrefillActor(
        worker_address=WorkerAddress(
            worker_id="prefill-1",
            node_id="node-t",
            host="127.0.0.1",
            store_address=site.store.address,
            proxy_address=proxy_address,
        ),
        options=options,
        config=PrefillConfig(),
    )
    watched = asyncio.create_task(every_progress(actor))
    host, _, port = (await actor.start()).rpartition(":")
    seen = await watched
    assert seen[-1].progress.stage == "loading weights" and seen[-1].progress.done == seen[-1].progress.total > 0
    assert host == "127.0.0.1" and int(port) > 0
    running = asyncio.create_task(actor.run())
    await asyncio.sleep(0)
    assert not running.done()
    await actor.stop(0.0)
    await running
    await actor.stop(0.0)
