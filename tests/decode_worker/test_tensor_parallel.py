"""Workers of two processes beside workers of one: hand-offs and prefixes pass between them, and a rank's death is its worker's."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.engine.executor import DeviceLost
from halfmoon.protocol.errors import WorkerLost

Greedy = Callable[[list[int], int], list[int]]

HANG_S = 60.0


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(f"{num_tokens}/{seed}").choices(range(3, 160), k=num_tokens)


async def run(cluster: Any, prefill: Any, decode: Any, token_ids: list[int], **sampling: Any) -> Any:
    """A request whose prompt one worker computes and which another one answers."""
    cluster.prefill_stub, cluster.decode_stub = cluster.stub_pair(prefill, decode)
    return await cluster.run(token_ids, **sampling)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
async def test_workers_of_unequal_size_exchange_hand_offs_and_prefixes(
    make_cluster: Any, greedy: Greedy, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfmoon.decode_worker.worker.CACHE_PATIENCE_S", 60.0)  # an answer's blocks are cached at its end
    cluster = await make_cluster(transport, both=1, prefix_cache_hbm=False)
    (one,) = cluster.workers
    two = await cluster.add("both-1", "both", tensor_parallel=2)
    assert one.facts.schema == two.facts.schema
    seeded = {"temperature": 1.0, "top_p": 0.9, "seed": 77, "num_logprobs": 2}
    for number, (prefill, decode) in enumerate([(two, one), (one, two)]):
        text = prompt(101, number)  # more than a step's 64 tokens, and a part of a block at its end
        answer = await run(cluster, prefill, decode, text, max_tokens=6)
        assert answer.token_ids == greedy(text, 6)
        assert answer.state.num_cached_tokens == 0
        # what one wrote, the other one finds: the prompt and its answer, behind which there is a new turn
        turn = [*text, *answer.token_ids, 7, 8]
        again = await run(cluster, decode, prefill, turn, max_tokens=3)
        assert again.token_ids == greedy(turn, 3)
        assert again.state.num_cached_tokens == 104 and again.state.phases.load_transport == ("shm" if transport == "auto" else "grpc")
        drawn = [await run(cluster, *pair, prompt(40, 9), max_tokens=5, **seeded) for pair in ((prefill, decode), (one, one))]
        assert drawn[0].token_ids == drawn[1].token_ids
        for ours, theirs in zip(drawn[0].tokens, drawn[1].tokens, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    # steps of several sequences, and of prompts beside answers
    prompts = [prompt(length, 20 + length) for length in (70, 33, 90, 12)]
    mixed = await asyncio.gather(*(run(cluster, two, two, text, max_tokens=4) for text in prompts))
    assert [answer.token_ids for answer in mixed] == [greedy(text, 4) for text in prompts]
    await cluster.every_page_is_free()


def kill_in_step(worker: Any, of_step: Callable[[list[Any]], bool]) -> str:
    """Kills the worker's other rank at the beginning of such a step. Returns what it should be told as."""
    (pid,), engine = worker.executor.pids, worker.executor.engine
    forward = engine.forward

    def killing(chunks: Any, **hooks: Any) -> Any:
        if of_step(chunks):
            os.kill(pid, signal.SIGKILL)
        return forward(chunks, **hooks)

    engine.forward = killing
    return f"rank 1 of 2 (process {pid}) was killed by SIGKILL"


async def require_broken(cluster: Any, worker: Any, error: Any, reason: str) -> None:
    assert isinstance(error, WorkerLost) and reason in error.message
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(worker.serve_until_stopped(), HANG_S)
    assert cluster.members.broken[worker.worker_id].reason == reason


async def test_a_rank_that_is_killed_is_its_workers_death(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster(prefill={"tensor_parallel": 2}, decode={"tensor_parallel": 2})
    prefill, decode = cluster.workers
    text = prompt(40)
    assert (await cluster.run(text, max_tokens=4)).token_ids == greedy(text, 4)

    sequence = cluster.sequence(prompt(30, 1), max_tokens=200)
    reason = kill_in_step(decode, lambda chunks: chunks[0].sequence.num_output_tokens == 5)
    answering = cluster.start_decode(sequence)
    await cluster.start_prefill(sequence)
    await require_broken(cluster, decode, await cluster.error_of(answering), reason)

    reason = kill_in_step(prefill, lambda chunks: chunks[0].start > 0)
    computing = cluster.start_prefill(cluster.sequence(prompt(150, 2), max_tokens=4))
    await require_broken(cluster, prefill, await cluster.error_of(computing), reason)


async def test_a_rank_that_is_killed_while_nothing_runs_is_noticed(make_cluster: Any) -> None:
    cluster = await make_cluster(both=1, decode={"tensor_parallel": 2})
    (worker,) = cluster.workers
    (pid,) = worker.executor.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceLost, match="was killed by SIGKILL"):
        await asyncio.wait_for(worker.serve_until_stopped(), HANG_S)
    error = await cluster.error_of(cluster.start_decode(cluster.sequence(prompt(9)), local=True))
    assert isinstance(error, WorkerLost) and f"(process {pid})" in error.message
