"""A worker whose store dies, does not answer, comes back, or was never there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.errors import StoreUnavailable
from halfmoon.tests.waiting import until

Greedy = Callable[[list[int], int], list[int]]


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + 7 * i + i * i) % 157 + 3 for i in range(num_tokens)]


async def test_a_store_s_death_fails_who_waits_for_it_and_leaves_who_decodes_alone(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    cluster.decode.slow(0.01)
    running = cluster.sequence(prompt(20), max_tokens=60)
    decoding = cluster.start_decode(running)
    await cluster.start_prefill(running)
    answer = cluster.answer()
    reading = asyncio.create_task(cluster.read(decoding, answer))
    await until(lambda: bool(answer.token_ids))
    waiting = cluster.start_decode(cluster.sequence(prompt(30)))
    await until(lambda: cluster.store.stats().num_sessions == 2 and cluster.decode.load().num_waiting == 1)
    await cluster.store.stop(0.0)
    assert isinstance(await cluster.error_of(waiting), StoreUnavailable)
    await reading
    assert answer.token_ids == greedy(prompt(20), 60)
    await cluster.new_store()
    again = await cluster.run(prompt(20), max_tokens=5)
    assert again.token_ids == answer.token_ids[:5]
    await cluster.at_rest()


async def test_hand_offs_that_are_decided_wait_for_the_store_to_be_attached_and_prefixes_are_found_again(
    make_cluster: Any, greedy: Greedy
) -> None:
    cluster = await make_cluster(prefix_cache_hbm=False)
    await cluster.store.stop(0.0)
    for worker in (cluster.prefill, cluster.decode):
        await until(lambda worker=worker: not worker.is_attached)
    early = asyncio.create_task(cluster.run(prompt(30), max_tokens=8))
    await until(lambda: cluster.prefill.load().num_running == 1 and cluster.decode.load().num_waiting == 1)
    await cluster.new_store()
    assert (await early).token_ids == greedy(prompt(30), 8)
    second = await cluster.run(prompt(30), max_tokens=8)
    assert second.token_ids == greedy(prompt(30), 8) and second.state.num_cached_tokens == 24
    await cluster.at_rest()


async def test_a_hand_off_that_waits_for_its_store_ends_at_its_deadline_and_frees_its_pages(make_cluster: Any) -> None:
    cluster = await make_cluster()
    await cluster.store.stop(0.0)
    for worker in (cluster.prefill, cluster.decode):
        await until(lambda worker=worker: not worker.is_attached)
    sequence = cluster.sequence(prompt(30), deadline_s=0.2)
    errors = await asyncio.gather(cluster.error_of(cluster.start_decode(sequence)), cluster.error_of(cluster.start_prefill(sequence)))
    assert [error.code for error in errors] == ["deadline_exceeded"] * 2
    await cluster.new_store()
    await cluster.at_rest()


async def test_a_hand_off_goes_through_another_node_s_store(make_cluster: Any, greedy: Greedy, elsewhere: StoreServer) -> None:
    cluster = await make_cluster()
    await cluster.store.stop(0.0)
    for worker in (cluster.prefill, cluster.decode):
        await until(lambda worker=worker: not worker.is_attached)
    cluster.store = elsewhere
    sequence = cluster.sequence(prompt(45), max_tokens=12)
    decoding = cluster.start_decode(sequence, store_address=elsewhere.address, skip_own_store=True)
    await cluster.start_prefill(sequence, store_address=elsewhere.address)
    answer = await cluster.read(decoding, cluster.answer())
    assert answer.token_ids == greedy(prompt(45), 12)
    assert elsewhere.stats().num_bytes_pushed > 0
    await cluster.at_rest()


async def test_the_death_of_another_node_s_store_fails_the_hand_off_that_lies_there(make_cluster: Any, elsewhere: StoreServer) -> None:
    cluster = await make_cluster()
    waiting = cluster.start_decode(cluster.sequence(prompt(30)), store_address=elsewhere.address)
    own = cluster.start_decode(cluster.sequence(prompt(31)))
    await until(lambda: sum(job.client is not None for job in cluster.decode.half._jobs.values()) == 2)
    await elsewhere.stop(0.0)
    assert isinstance(await cluster.error_of(waiting), StoreUnavailable)
    assert cluster.decode.load().num_waiting == 1, "its own store's hand-off is waited for all the same"
    own.cancel()
    await cluster.at_rest()


async def test_a_store_that_does_not_answer_is_not_asked_where_the_request_says_so(
    make_cluster: Any, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await make_cluster()
    asked: list[int] = []

    async def frozen(_: StoreClient, keys: list[bytes], *_options: Any) -> Any:
        asked.append(len(keys))
        await asyncio.Event().wait()

    monkeypatch.setattr(StoreClient, "fetch_prefix", frozen)
    local = cluster.start_decode(cluster.sequence(prompt(30), max_tokens=5), local=True, skip_own_store=True)
    assert (await cluster.read(local, cluster.answer())).token_ids == greedy(prompt(30), 5)
    assert asked == []
    await until(lambda: cluster.decode.scheduler.at_rest)


async def test_a_worker_that_starts_while_its_store_is_dead_serves_and_attaches_later(make_cluster: Any, greedy: Greedy) -> None:
    cluster = await make_cluster()
    await cluster.store.stop(0.0)
    await cluster.add_decode()
    assert not cluster.decode.is_attached
    assert (await cluster.run_local(prompt(30), max_tokens=5)).token_ids == greedy(prompt(30), 5)
    await cluster.new_store()
    assert (await cluster.run(prompt(40), max_tokens=5)).token_ids == greedy(prompt(40), 5)
    await cluster.at_rest()
