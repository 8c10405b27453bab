"""WorkerActor, as Ray would drive it, in every role."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from halfmoon.deploy.actors import WorkerActor
from halfmoon.protocol.config import DecodeConfig, PrefillConfig


async def every_progress(actor: Any) -> list[Any]:
    """What somebody who always asks for the next one is told, to the end of the start."""
    seen: list[Any] = []
    while (found := await actor.progress(seen[-1].number if seen else 0)) is not None:
        seen.append(found)
    return seen


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
async def test_an_actor_runs_from_start_to_stop(make_cluster: Any, role: Any) -> None:
    cluster = await make_cluster()
    actor = WorkerActor(
        worker_address=dataclasses.replace(cluster.decode.life.worker_address, worker_id="worker-1"),
        role=role,
        options=cluster.options,
        prefill=PrefillConfig(),
        decode=DecodeConfig(),
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
