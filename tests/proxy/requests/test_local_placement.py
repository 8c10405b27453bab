"""Requests whose decode worker computes the prompt: how they are placed, and their one leg over scripted peers."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.errors import NoWorker, WorkerLost
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.placement import MemberState, Placement, PlacementRequest, Rejection, Snapshot
from halfmoon.proxy.conductor.policies import POLICIES, create_policy
from halfmoon.proxy.request import RequestState
from halfmoon.proxy.requests.readiness import missing_parts
from halfmoon.tests.waiting import within

BLOCK_SIZE = 16


def worker(role: str, number: int, tokens: int = 0, capacity: int = 0) -> MemberState:
    return MemberState(f"{role}-{number}", f"{role}-{number}.1", f"store-{number}", tokens, capacity)


def conductor(local_prefill: Any, policy: str = "cache_aware") -> Conductor:
    return Conductor(create_policy(policy, random.Random(0)), local_prefill=local_prefill)


# Placement


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("local_prefill", ["never", "fallback", "always"])
@given(
    num_prefill=st.integers(0, 2),
    loads=st.lists(st.integers(0, 1000), max_size=3),
    excluded=st.sets(st.sampled_from(["prefill-0.1", "prefill-1.1", "decode-0.1", "decode-1.1"])),
    held=st.dictionaries(st.sampled_from(["store-0", "store-1", "store-7"]), st.integers(1, 5)),
)
@settings(max_examples=40)
def test_a_decode_worker_prefills_exactly_when_it_must_and_may(
    policy: str, local_prefill: str, num_prefill: int, loads: list[int], excluded: set[str], held: dict[str, int]
) -> None:
    decode = tuple(worker("decode", number, tokens) for number, tokens in enumerate(loads))
    snapshot = Snapshot.of(tuple(worker("prefill", number) for number in range(num_prefill)), decode, BLOCK_SIZE)
    request = PlacementRequest(80, held, frozenset(excluded))
    answer = conductor(local_prefill, policy).place(request, snapshot)
    has_prefill = any(member.incarnation not in excluded for member in snapshot.prefill)
    has_decode = any(member.incarnation not in excluded for member in decode)
    if not has_decode or (local_prefill == "never" and not has_prefill):
        assert isinstance(answer, Rejection) and answer.code == "no_worker"
        return
    assert isinstance(answer, Placement)
    assert answer.is_local == (local_prefill == "always" or not has_prefill)
    assert answer.decode in decode and answer.decode.incarnation not in excluded
    if answer.is_local:
        assert answer.prefill is answer.decode and answer.prefix is None, "a decode worker loads from its own store alone"
        assert answer.num_cached_tokens == min(held.get(answer.decode.store_address, 0), 4) * BLOCK_SIZE
        why = "always" if local_prefill == "always" else "no prefill worker is alive"
        assert answer.reason.startswith(f"{policy}: {answer.decode.id} computes the prompt itself") and why in answer.reason


def test_a_local_prompt_goes_where_its_prefix_lies() -> None:
    snapshot = Snapshot.of((), (worker("decode", 0, 10), worker("decode", 1, 40)), BLOCK_SIZE)
    answer = conductor("fallback").place(PlacementRequest(80, {"store-1": 4}), snapshot)
    assert isinstance(answer, Placement) and (answer.decode.id, answer.num_cached_tokens) == ("decode-1", 64)


def test_a_prompt_that_no_prefill_worker_holds_is_too_long_and_does_not_fall_back() -> None:
    snapshot = Snapshot.of((worker("prefill", 0, capacity=64),), (worker("decode", 0),), BLOCK_SIZE)
    answer = conductor("fallback").place(PlacementRequest(65), snapshot)
    assert isinstance(answer, Rejection) and answer.code == "prompt_too_long"


# One leg


async def test_one_call_gives_the_tokens_and_a_phase_record_of_one_worker(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 1)
    gate = asyncio.Event()
    bench.decodes[0].before_admission = gate.wait
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.decodes[0].arrived.wait())
    assert stream.state is RequestState.PREFILL
    assert bench.cluster.members["decode-0"].context.num_tokens == 10, "its context, once"
    gate.set()
    token_ids, finished = await within(5, peers.read(stream))
    assert token_ids == peers.answer(request) and bench.decodes[0].requests[0].local_prefill
    record = finished.phases
    assert (record.prefill_worker, record.decode_worker, record.transport) == ("decode-0", "decode-0", "local")
    assert (record.prefill_queue_s, record.prefix_load_s, record.prefill_s, record.push_s) == (0.25, 0.5, 0.75, 0)
    assert 0 <= record.handoff_wait_s <= record.ttft_s - record.prefill_done_s and 0 < record.prefill_done_s <= record.ttft_s
    assert finished.usage.num_cached_tokens == 8
    for state, count in (("queued", 1), ("prefill", 1), ("handoff", 0), ("decode", 1), ("done", 1)):
        assert bench.sample("halfmoon_request_transitions_total", state=state) == count
    assert bench.sample("halfmoon_placements_total", policy="local") == 1
    assert bench.sample("halfmoon_placements_total", policy="least_loaded") == 0
    bench.assert_at_rest()


async def test_always_leaves_prefill_workers_alone_and_a_living_one_is_no_reason_to_fall_back(make_bench: Any, peers: Any) -> None:
    for local_prefill, num_prefills in (("always", 0), ("fallback", 1)):
        bench = await make_bench(local_prefill=local_prefill)
        await within(5, peers.read(bench.router.open(bench.request())))
        assert len(bench.prefills[0].requests) == num_prefills
        assert [request.local_prefill for request in bench.decodes[0].requests] == [num_prefills == 0]


async def test_a_prefill_worker_that_dies_without_another_is_made_up_for_by_decode(bench: Any, peers: Any) -> None:
    bench.prefills[0].before_seal = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.prefills[0].arrived.wait())
    await within(2, bench.decodes[0].arrived.wait())
    await bench.prefills[0].kill()
    token_ids, finished = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request)
    assert [decode.local_prefill for decode in bench.decodes[0].requests] == [False, True]
    assert (finished.phases.num_attempts, finished.phases.prefill_worker) == (2, "decode-0")
    bench.assert_at_rest()
    await bench.join(bench.prefills[0])
    bench.prefills[0].before_seal = lambda _: asyncio.sleep(0)
    _, finished = await within(2, peers.read(bench.router.open(bench.request())))
    assert finished.phases.prefill_worker == "prefill-0", "it is back"


@pytest.mark.parametrize("sent", [None, 0, 3])
async def test_a_decode_worker_that_dies_costs_a_replay_with_exactly_the_sent_tokens(make_bench: Any, peers: Any, sent: int | None) -> None:
    """sent None: before the admission."""
    bench = await make_bench(0, 2)
    dying, reached = bench.decodes[0], asyncio.Event()

    async def stand_still(index: int | None = None) -> None:
        if index == sent:
            reached.set()
            await peers.forever()

    dying.before_token = dying.before_admission = stand_still
    request = bench.request()
    stream = bench.router.open(request)
    first = await within(2, peers.take(stream, sent or 0))
    await within(2, reached.wait())
    await dying.kill()
    rest, finished = await within(2, peers.read(stream))
    assert first + rest == peers.answer(request)
    (replay,) = bench.decodes[1].requests
    assert replay.local_prefill and list(replay.sequence.token_ids) == request.token_ids + first
    assert (finished.phases.num_attempts, finished.phases.decode_worker) == (2, "decode-1")
    assert bench.sample("halfmoon_request_replays_total", reason="worker_lost") == 1
    bench.assert_at_rest()


async def test_a_replay_of_a_local_request_takes_a_pair_where_there_is_one_again(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 2)
    bench.decodes[0].before_admission = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.decodes[0].arrived.wait())
    await bench.add("prefill", bench.stores[0])
    await bench.decodes[0].kill()
    token_ids, finished = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request)
    assert (finished.phases.prefill_worker, finished.phases.decode_worker) == ("prefill-0", "decode-1")
    assert not bench.decodes[1].requests[0].local_prefill


async def test_the_store_s_death_does_not_matter_to_it(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 1)
    gate = asyncio.Event()
    bench.decodes[0].before_admission = gate.wait
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.decodes[0].arrived.wait())
    await bench.stores[0].leave()
    gate.set()
    token_ids, finished = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 1


async def test_a_client_that_goes_frees_the_worker_and_aborts_no_hand_off(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 1)
    bench.decodes[0].before_admission = peers.forever
    stream = bench.router.open(bench.request())
    await within(2, bench.decodes[0].arrived.wait())
    await stream.cancel("asked to")
    await within(1, bench.decodes[0].cancelled.wait())
    await asyncio.sleep(0.05)
    assert bench.stores[0].aborts == []
    bench.assert_at_rest()


async def test_an_error_of_the_worker_is_tried_again_on_another(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 2)

    async def lost() -> None:
        raise WorkerLost("the engine broke")

    bench.decodes[0].before_admission = lost
    _, finished = await within(2, peers.read(bench.router.open(bench.request())))
    assert finished.phases.decode_worker == "decode-1" and finished.reason == common_pb2.FINISH_REASON_LENGTH


async def test_a_cluster_without_prefill_workers_is_ready_where_it_may_serve(make_bench: Any) -> None:
    assert missing_parts((await make_bench(0, 1)).router) == []
    forbidden = await make_bench(0, 1, local_prefill="never")
    assert missing_parts(forbidden.router) == ["no prefill worker has joined"]
    await forbidden.stores[0].leave()
    while "store-0" in forbidden.cluster.members:
        await asyncio.sleep(0.01)
    assert missing_parts(forbidden.router) == ["no KV store has joined", "no prefill worker has joined"]
    with pytest.raises(NoWorker, match="no live KV store"):
        forbidden.router.open(forbidden.request())
