"""A step that does not end, and a copy that does not: the worker's reports say so, from beside them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(3, 160), k=num_tokens)


def wedge_step(view: Any, gate: threading.Event) -> None:
    forward = view.engine.forward

    def wedged(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(120)
        return forward(*args, **kwargs)

    view.engine.forward = wedged


def wedge_copy(view: Any, gate: threading.Event) -> None:
    view.worker.executor.pages.when_landed(lambda: gate.wait(120))


@pytest.mark.parametrize(("wedge", "age"), [(wedge_step, "step_age_s"), (wedge_copy, "transfer_age_s")])
async def test_a_worker_reports_how_long_it_has_been_at_what_does_not_end(
    make_cluster: Any, members: Any, greedy: Greedy, wedge: Callable[..., None], age: str
) -> None:
    cluster = await make_cluster(both=1)
    worker = cluster.decode
    await asyncio.wait_for(worker.life.joined.wait(), 60)
    gate = threading.Event()
    wedge(worker, gate)
    answer = asyncio.create_task(cluster.run_local(prompt(40), max_tokens=6))

    def reported() -> float:
        return getattr(members.loads[worker.worker.worker_id], age)

    async with asyncio.timeout(60):
        while reported() < 0.6:
            await asyncio.sleep(0.02)
        gate.set()
        assert (await answer).token_ids == greedy(prompt(40), 6)
        while reported() > 0.0:
            await asyncio.sleep(0.02)
    await cluster.at_rest()
