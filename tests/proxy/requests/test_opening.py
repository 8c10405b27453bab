"""Opening requests: all of them or none, whatever goes wrong, and never in the way of others."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.errors import Draining, InvalidRequest
from halfmoon.protocol.v1 import common_pb2, worker_pb2
from halfmoon.proxy.prefixes.replicator import Replicator
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests import prompt as prompts
from halfmoon.proxy.requests import router as routers
from halfmoon.proxy.requests.placer import Placer
from halfmoon.proxy.requests.runner import RequestRunner


def choices(bench: Any, n: int, prompt: list[int] | None = None) -> list[ProxyRequest]:
    first = bench.request(prompt)
    return [ProxyRequest(f"c-{at}", first.token_ids, first.sampling, first.timeout_s) for at in range(n)]


def assert_untouched(bench: Any) -> None:
    """As if nobody had asked."""
    bench.assert_at_rest()
    router = bench.router
    assert router._placer.load_tracker.is_idle and not router._opening and not router._runners
    assert router._queue.num_tokens == 0 and len(bench.cluster._table.tasks) == 0
    assert not router._index._promises.stores
    assert all(
        member.num_loads == 0 and member.context.num_requests == member.backlog.assigned.num_requests == 0
        for member in bench.cluster.members.values()
    )


def nth(n: int, found: Callable[..., Any], broken: Exception) -> Callable[..., Any]:
    """found, but the n-th call raises."""
    calls = iter(range(1, 10**6))

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == n:
            raise broken
        return found(*args, **options)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(Placer, "place", 3), (Replicator, "placed", 2), (RequestRunner, "__init__", 2), (Placer, "_ask", 1)],
)
async def test_a_bug_while_opening_undoes_what_was_assigned_before(
    bench: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, nth(at, getattr(owner, name), OverflowError("a bug")))
        with pytest.raises(OverflowError):
            await bench.router.open_all(choices(bench, 4))
    await asyncio.sleep(0)
    assert_untouched(bench)
    assert bench.router.decisions.find("c")[0].ended.startswith(("internal: OverflowError: a bug", "cancelled"))
    assert bench.metrics.outcomes["failed"] == 4, "each choice is one"
    streams = await bench.router.open_all(choices(bench, 4))
    for stream in streams:
        await stream.cancel("enough")


async def test_a_caller_that_leaves_while_its_choices_are_placed_leaves_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "SLICE_S", 0.0)
    placed = asyncio.Event()
    monkeypatch.setattr(Replicator, "placed", lambda self, keys: placed.set())
    opening = asyncio.create_task(bench.router.open_all(choices(bench, 50)))
    await placed.wait()
    assert bench.router.num_queued == 50, "their room is taken"
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert_untouched(bench)
    assert bench.router.decisions.find("c")[0].state == "aborted"


async def test_what_is_being_opened_holds_its_ids_and_a_drain_ends_it(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "SLICE_S", 0.0)
    opening = asyncio.create_task(bench.router.open_all(choices(bench, 50)))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="'c-7' is under way already"):
        bench.router.open(choices(bench, 8)[7])
    assert await bench.router.drain(0.0) == 0
    with pytest.raises(Draining):
        await opening
    assert_untouched(bench)


async def test_choices_of_one_prompt_are_hashed_once_and_others_are_served_meanwhile(
    bench: Any, peers: Any, loop_turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def count(root: bytes, token_ids: Any, *args: Any, **options: Any) -> list[bytes]:
        hashed.append(len(token_ids))
        return block_keys(root, token_ids, *args, **options)

    monkeypatch.setattr(prompts, "block_keys", count)
    monkeypatch.setattr(prompts, "PART_TOKENS", 100)
    monkeypatch.setattr(routers, "SLICE_S", 0.0)
    requests = choices(bench, 20, list(range(400)))
    async with loop_turns() as turns:
        streams = await bench.router.open_all(requests)
    assert hashed == [100] * 4
    assert turns.num >= 4 + 20 + 20, "one a part, a placement, a start"
    found = await asyncio.gather(*(peers.read(stream) for stream in streams))
    assert [token_ids for token_ids, _ in found] == [peers.answer(request) for request in requests]


async def test_the_keys_travel_to_both_workers_and_a_replay_s_cover_what_was_sent(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2, policy="round_robin")
    request, reached = bench.request(list(range(50, 61)), max_tokens=8), asyncio.Event()

    async def stall(index: int) -> None:
        if index == 3:
            reached.set()
            await asyncio.Event().wait()

    bench.decodes[0].before_token = stall
    stream = bench.router.open(request)
    await peers.take(stream, 3)
    await reached.wait()
    await bench.decodes[0].kill()
    await peers.read(stream)
    root = root_key(peers.SCHEMA.fingerprint)
    for worker in (bench.prefills[0], bench.decodes[0], bench.decodes[1]):
        for received in worker.requests:
            sequence = received.sequence
            assert list(sequence.block_keys) == block_keys(root, list(sequence.token_ids), 4)
    assert len(bench.decodes[1].requests[0].sequence.token_ids) == 11 + 3


async def test_a_worker_that_leaves_between_placement_and_start_costs_a_replay(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1, policy="round_robin")
    request = bench.request()
    stream = bench.router.open(request)
    gone = bench.cluster.members["prefill-0"]
    bench.cluster.leave(gone, gone.stream)  # before the runner had its first turn
    token_ids, finished = await asyncio.wait_for(peers.read(stream), 60)
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 2


async def test_time_to_first_token_counts_from_the_arrival_that_the_face_names(bench: Any, peers: Any) -> None:
    request = bench.request()
    late = ProxyRequest(request.request_id, request.token_ids, request.sampling, request.timeout_s, arrival=time.monotonic() - 3.0)
    _, finished = await peers.read(bench.router.open(late))
    assert finished.phases.ttft_s > 3.0 and finished.phases.queue_s > 3.0


async def test_a_second_replay_sends_what_was_sent_in_both_attempts_once(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 3, policy="round_robin")
    request = bench.request(list(range(50, 61)), max_tokens=9)
    reached = [asyncio.Event(), asyncio.Event()]

    def stall_at(at: int, event: asyncio.Event) -> Callable[[int], Any]:
        async def stall(index: int) -> None:
            if index == at:
                event.set()
                await asyncio.Event().wait()

        return stall

    bench.decodes[0].before_token, bench.decodes[1].before_token = stall_at(3, reached[0]), stall_at(6, reached[1])
    stream, token_ids = bench.router.open(request), []
    for decode, event in zip(bench.decodes, reached, strict=False):
        token_ids += await peers.take(stream, 3)
        await event.wait()
        await decode.kill()
    rest, finished = await peers.read(stream)
    token_ids += rest
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 3
    last = bench.decodes[2].requests[0].sequence
    assert list(last.token_ids) == [*request.token_ids, *token_ids[:6]]
    assert list(last.block_keys) == block_keys(root_key(peers.SCHEMA.fingerprint), list(last.token_ids), 4)


async def test_a_million_tokens_go_to_both_workers_while_the_event_loop_turns(make_bench: Any, peers: Any, loop_gap: Any) -> None:
    bench, schema = await make_bench(0, 0), dataclasses.replace(peers.SCHEMA, block_size=64)
    prefill, decode = [await bench.add(role, bench.stores[0], schema=schema, unread=True) for role in ("prefill", "decode")]
    decode.before_answer = prefill.arrived.wait  # as an answer waits for its prompt; it ends the call that may still be on its way
    token_ids = array("I", range(1_000_000))
    began = time.process_time()
    sequence = common_pb2.SequenceSpec(token_ids=token_ids)
    worker_pb2.PrefillRequest(sequence=sequence).SerializeToString()
    alone_s, gaps_s = time.process_time() - began, []  # to copy and serialise it once, in one go
    for number in range(3):
        request = dataclasses.replace(bench.request(), request_id=f"long-{number}", token_ids=token_ids)
        prefill.arrived.clear()
        with loop_gap(asyncio.get_running_loop()) as gap:
            (stream,) = await bench.router.open_all([request])
            found, _ = await peers.read(stream)
        gaps_s.append(gap.longest_s)
        assert found == [9]
    assert min(gaps_s) < alone_s / 3, f"{gaps_s} of {alone_s:.3f} s"
    keys = block_keys(root_key(schema.fingerprint), token_ids, schema.block_size)
    for peer, kind in zip(bench.unread, (worker_pb2.PrefillRequest, worker_pb2.DecodeRequest), strict=True):
        read = kind.FromString(peer.requests[-1]).sequence
        assert read.request_id == "long-2" and array("I", read.token_ids) == token_ids and list(read.block_keys) == keys
