"""Requests over which workers break: who was computed then is given to two workers at most, and to the second one as a suspect."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.protocol.errors import HandoffAborted, NonFiniteLogits, RequestQuarantined, SequenceFailed, WorkerLost


def broke(peer: Any, *, in_step: bool) -> WorkerLost:
    return WorkerLost(f"worker {peer.id} broke", worker=peer.id, in_step=in_step)


def failing(peer: Any, error: Any) -> None:
    async def fail(_: Any) -> None:
        raise error

    peer.before_token = peer.before_seal = fail


async def arrived(peer: Any, num_requests: int) -> None:
    async with asyncio.timeout(60):
        while len(peer.requests) < num_requests:
            await asyncio.sleep(0.005)


def suspects(peers: list[Any]) -> list[list[bool]]:
    """Of every request that each of them got, whether it came as a suspect."""
    return [[request.sequence.suspect for request in peer.requests] for peer in peers]


async def test_a_request_over_which_two_workers_broke_is_not_given_to_a_third(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 4)
    for peer in bench.decodes:
        failing(peer, broke(peer, in_step=True))
    with pytest.raises(RequestQuarantined, match=r"2 workers broke while they computed request-1.* decode-"):
        await peers.read(bench.router.open(bench.request()))
    assert sorted(suspects(bench.decodes)) == [[], [], [False], [True]]
    assert bench.sample("halfmoon_requests_total", outcome="failed", reason="request_quarantined") == 1
    bench.assert_at_rest()


async def test_who_was_merely_on_the_workers_that_broke_is_replayed_to_its_end(make_bench: Any, peers: Any) -> None:
    """The workers say on their Join streams what they computed when they broke; their calls never end."""
    bench = await make_bench(1, 1)
    poison, neighbour = bench.request(), bench.request()
    bench.decodes[0].before_token = peers.forever
    streams = [bench.router.open(poison), bench.router.open(neighbour)]
    await arrived(bench.decodes[0], 2)
    second = await bench.add("decode", bench.stores[0])
    second.before_token = peers.forever
    bench.decodes[0].breaks(poison.request_id)
    await arrived(second, 2)
    await bench.add("decode", bench.stores[0])
    second.breaks(poison.request_id)
    with pytest.raises(RequestQuarantined, match="the context is gone"):
        await peers.read(streams[0])
    token_ids, _ = await peers.read(streams[1])
    assert token_ids == peers.answer(neighbour)
    came = {request.sequence.request_id: request.sequence.suspect for request in second.requests}
    assert came == {poison.request_id: True, neighbour.request_id: False}
    assert [request.sequence.request_id for request in bench.decodes[2].requests] == [neighbour.request_id]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_step_that_failed_over_it_once_is_replayed_as_a_suspect_elsewhere(make_bench: Any, peers: Any, role: str) -> None:
    bench = await make_bench(2, 2)
    workers = bench.prefills if role == "prefill" else bench.decodes
    failing(workers[0], SequenceFailed("it broke the step", worker=workers[0].id))
    request = bench.request()
    token_ids, _ = await peers.read(bench.router.open(request))
    assert token_ids == peers.answer(request)
    assert suspects(workers) in ([[False], [True]], [[], [False]])


async def test_workers_that_die_of_something_else_make_no_suspect(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 4)
    for peer in bench.decodes:
        failing(peer, broke(peer, in_step=False))
    with pytest.raises(WorkerLost, match="attempt 3 of 3"):
        await peers.read(bench.router.open(bench.request()))
    assert sorted(suspects(bench.decodes)) == [[], [False], [False], [False]]


async def test_why_prefill_gave_a_hand_off_up_counts_wherever_it_is_heard_first(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 1)
    bench.prefills[0].before_seal = lambda _: peers.forever()
    told = HandoffAborted(
        "aborted", reason="non_finite_logits", reason_message="logits are not finite", reason_fields={"worker": "prefill-0", "token": 1}
    )
    bench.board.at = lambda handoff: failed(told)
    with pytest.raises(NonFiniteLogits, match="logits are not finite"):
        await peers.read(bench.router.open(bench.request()))
    assert len(bench.decodes[0].requests) == 1


async def test_the_worker_that_broke_is_left_out_and_not_the_one_that_heard_of_it(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1)
    request, board = bench.request(), bench.board.at
    first = True

    def at(handoff: Any) -> Any:
        nonlocal first
        if not first:
            return board(handoff)
        first = False
        lost = {"worker": bench.prefills[0].id, "in_step": False}
        return failed(HandoffAborted("aborted", reason="worker_lost", reason_message="prefill-0 broke", reason_fields=lost))

    bench.prefills[0].before_seal = lambda _: peers.forever()
    bench.board.at = at
    token_ids, finished = await peers.read(bench.router.open(request))
    assert token_ids == peers.answer(request) and finished.phases.prefill_worker == "prefill-1"


def failed(error: Exception) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
