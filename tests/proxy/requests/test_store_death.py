"""Stores and workers that die, over scripted peers: a request goes on where anybody can serve it, and waits where nobody can."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from halfmoon.protocol.errors import DeadlineExceeded, HandoffAborted, NoWorker, PromptTooLong, StoreUnavailable, WorkerLost
from halfmoon.proxy.request import RequestState
from halfmoon.proxy.requests.readiness import missing_parts
from halfmoon.tests.waiting import until, within

VICTIMS = ("store", "prefill", "decode")
PHASES = ("before", "prefill", "handoff", "decode")


async def lose(bench: Any, *peers: Any) -> None:
    """They die, one after another, and the proxy knows."""
    for peer in peers:
        await peer.kill()
    await until(lambda: not {peer.id for peer in peers} & bench.cluster.members.keys())


def waits(bench: Any) -> bool:
    return len(bench.router._context.comings) > 0


class Stage:
    """The first request stands still where the phase says so, until everybody may go on."""

    def __init__(self, bench: Any, phase: str) -> None:
        self.reached, self._go_on = asyncio.Event(), asyncio.Event()
        self._stands = False
        prefill = bench.prefills[0]
        if phase == "prefill":
            prefill.before_seal = lambda _: self._stand_still()
        elif phase != "before":
            at = 0 if phase == "handoff" else 3
            for decode in bench.decodes:
                decode.before_token = lambda index: self._stand_still() if index == at else asyncio.sleep(0)

    async def _stand_still(self) -> None:
        if not self._stands:
            self._stands = True
            self.reached.set()
            await self._go_on.wait()

    def go_on(self) -> None:
        self._go_on.set()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victims", [*itertools.permutations(VICTIMS, 1), *itertools.permutations(VICTIMS, 2)], ids="+".join)
async def test_whoever_dies_the_answer_is_exact_while_a_decode_worker_is_left(
    make_bench: Any, peers: Any, victims: tuple[str, ...], phase: str
) -> None:
    bench = await make_bench(1, 2)
    stage, request = Stage(bench, phase), bench.request()

    async def kill() -> None:
        with_request = next((decode for decode in bench.decodes if decode.requests), bench.decodes[0])
        dying = {"store": bench.stores[0], "prefill": bench.prefills[0], "decode": with_request}
        for victim in victims:
            await dying[victim].kill()
        if phase == "before":
            await until(lambda: not {dying[victim].id for victim in victims} & bench.cluster.members.keys())

    if phase == "before":
        await kill()
    stream = bench.router.open(request)
    reading = asyncio.create_task(peers.read(stream))
    if phase != "before":
        await within(2, stage.reached.wait())
        if phase == "handoff":
            await until(lambda: stream.state is RequestState.HANDOFF)
        await kill()
        stage.go_on()
    token_ids, finished = await within(3, reading)
    assert token_ids == peers.answer(request)
    assert finished.phases.num_attempts <= 1 + len(victims)
    bench.assert_at_rest()
    after = bench.request()
    token_ids, finished = await within(3, peers.read(bench.router.open(after)))
    assert token_ids == peers.answer(after) and finished.phases.num_attempts == 1
    assert (finished.phases.transport == "local") == bool({"store", "prefill"} & set(victims))


async def test_without_a_store_decode_workers_compute_prompts_and_with_it_hand_offs_go_on(make_bench: Any, peers: Any) -> None:
    bench = await make_bench()
    await lose(bench, bench.stores[0])
    assert missing_parts(bench.router) == []
    request = bench.request()
    token_ids, finished = await within(2, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request) and finished.phases.transport == "local"
    (call,) = bench.decodes[0].requests
    assert call.local_prefill and call.skip_own_store and not call.store_address
    assert bench.sample("halfmoon_fallbacks_total", reason="local_prefill") == 1
    await bench.join(bench.stores[0])
    _, finished = await within(2, peers.read(bench.router.open(bench.request())))
    assert finished.phases.prefill_worker == "prefill-0"
    assert not bench.decodes[0].requests[1].skip_own_store and not bench.prefills[0].requests[0].skip_own_store
    assert bench.prefills[0].requests[0].store_address == bench.decodes[0].requests[1].store_address == bench.stores[0].address
    bench.assert_at_rest()


@pytest.mark.parametrize("dead", ["decode", "prefill", "both"])
async def test_of_two_nodes_the_store_that_is_left_takes_the_hand_offs(make_bench: Any, peers: Any, dead: str) -> None:
    """The first store's node has the decode worker, or the prefill worker, or both; the other node's store is alive."""
    bench = await make_bench(0, 0)
    here, there = bench.stores[0], await bench.add("store")
    await bench.add("prefill", there if dead == "decode" else here)
    await bench.add("decode", there if dead == "prefill" else here)
    await lose(bench, here)
    request = bench.request()
    token_ids, finished = await within(2, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request) and finished.phases.prefill_worker == "prefill-0"
    (prefill,), (decode,) = bench.prefills[0].requests, bench.decodes[0].requests
    assert prefill.store_address == decode.store_address == there.address
    assert (prefill.skip_own_store, decode.skip_own_store) == (dead != "decode", dead != "prefill")
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(bench.request())
    await within(2, bench.prefills[0].arrived.wait())
    await stream.cancel("enough")
    await within(2, there.aborted.wait())


async def test_stores_that_die_again_and_again_end_no_request(make_bench: Any, peers: Any) -> None:
    """Each attempt stands in prefill when its store dies. Only a failure that a request might cause counts as an attempt."""
    bench = await make_bench(local_prefill="never", max_attempts=2)
    store, prefill = bench.stores[0], bench.prefills[0]
    prefill.before_seal = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    for number in range(1, 5):
        await until(lambda number=number: len(prefill.requests) == number)
        if number == 4:
            prefill.before_seal = lambda _: asyncio.sleep(0)
        await lose(bench, store)
        await until(lambda: waits(bench))
        await bench.join(store)
    token_ids, finished = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 5
    bench.assert_at_rest()


@pytest.mark.parametrize(("role", "sent"), [("prefill", None), ("decode", None), ("decode", 0), ("decode", 3)])
async def test_a_request_that_nobody_can_serve_goes_on_when_somebody_comes(
    make_bench: Any, peers: Any, role: str, sent: int | None
) -> None:
    """sent None: it dies while the prompt is computed."""
    bench = await make_bench(local_prefill="never")
    dying = bench.prefills[0] if role == "prefill" else bench.decodes[0]
    bench.prefills[0].before_seal = peers.forever if sent is None else (lambda _: asyncio.sleep(0))
    bench.decodes[0].before_token = lambda index: peers.forever() if index == sent else asyncio.sleep(0)
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.prefills[0].arrived.wait())
    await within(2, bench.decodes[0].arrived.wait())
    first = await within(2, peers.take(stream, sent or 0))
    await lose(bench, dying)
    await until(lambda: waits(bench))
    assert stream.state is RequestState.QUEUED and bench.cluster.members
    bench.prefills[0].before_seal = lambda _: asyncio.sleep(0)
    bench.decodes[0].before_token = lambda _: asyncio.sleep(0)
    await bench.join(dying)
    rest, finished = await within(2, peers.read(stream))
    assert first + rest == peers.answer(request) and finished.phases.num_attempts == 2
    assert not waits(bench)
    bench.assert_at_rest()


async def test_a_worker_that_takes_on_the_role_is_one_that_comes(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 0, 1, local_prefill="never")
    both = bench.boths[0]
    await bench.cluster.set_role(bench.cluster.members[both.id], "prefill", 60.0)
    decode = await bench.add("decode", bench.stores[0])
    decode.before_token = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, decode.arrived.wait())
    await lose(bench, decode)
    await until(lambda: waits(bench))
    await bench.cluster.set_role(bench.cluster.members[both.id], "both", 60.0)
    token_ids, _ = await within(2, peers.read(stream))
    assert token_ids == peers.answer(request)


async def test_who_waits_in_vain_ends_at_its_deadline_and_is_told_for_what(make_bench: Any, peers: Any) -> None:
    bench = await make_bench()
    bench.decodes[0].before_token = peers.forever
    stream = bench.router.open(bench.request(timeout_s=1.0))
    await within(2, bench.decodes[0].arrived.wait())
    await lose(bench, bench.decodes[0])
    with pytest.raises(
        DeadlineExceeded, match=r"1 s ran out in state queued: .*decode-0.*nothing to replay it on: .*no live decode worker"
    ):
        await within(2, peers.read(stream))
    assert not waits(bench)
    bench.assert_at_rest()


@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_who_waits_can_be_ended_by_its_client(make_bench: Any, peers: Any, how: str) -> None:
    bench = await make_bench()
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 3 else asyncio.sleep(0)
    stream = bench.router.open(bench.request())
    await within(2, peers.take(stream, 3))
    await lose(bench, bench.decodes[0])
    await until(lambda: waits(bench))
    if how == "cancel":
        await stream.cancel("enough")
    else:
        assert (await within(2, stream.stop())).usage.num_completion_tokens == 3
    await until(lambda: not waits(bench))
    bench.assert_at_rest()


async def test_a_worker_that_is_only_out_of_reach_is_tried_again_once_it_is_known_to_live(make_bench: Any, peers: Any) -> None:
    """Its calls broke, but it goes on reporting. Nobody else will come."""
    bench = await make_bench(0, 1)
    num_calls = 0

    async def break_once() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise WorkerLost("its channel broke")

    bench.decodes[0].before_admission = break_once
    request = bench.request()
    token_ids, finished = await within(2, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request) and finished.phases.num_attempts == 2


async def test_a_worker_that_can_t_reach_a_living_store_is_passed_over(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1)

    async def no_way(_: Any) -> None:
        raise StoreUnavailable("store-0 does not answer")

    bench.prefills[0].before_seal = no_way
    _, finished = await within(2, peers.read(bench.router.open(bench.request())))
    assert (finished.phases.prefill_worker, finished.phases.num_attempts) == ("prefill-1", 2)


async def test_who_waits_is_woken_one_in_a_turn_of_the_event_loop(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(0, 1)
    decode = bench.decodes[0]
    decode.before_admission = peers.forever
    requests = [bench.request() for _ in range(20)]
    streams = [bench.router.open(request) for request in requests]
    await until(lambda: len(decode.requests) == 20)
    await lose(bench, decode)
    await until(lambda: len(bench.router._context.comings) == 20)
    decode.before_admission = lambda: asyncio.sleep(0)
    turns: list[int] = []
    dispatcher, turn = bench.router._dispatcher, itertools.count()
    place_again = dispatcher.place_again
    dispatcher.place_again = lambda *args: (turns.append(next(turn)), place_again(*args))[1]
    counting = True

    def count() -> None:
        next(turn)
        if counting:
            asyncio.get_running_loop().call_soon(count)

    count()
    await bench.join(decode)
    answers = await within(4, asyncio.gather(*map(peers.read, streams)))
    counting = False
    assert [token_ids for token_ids, _ in answers] == [peers.answer(request) for request in requests]
    assert len(turns) == 20 and all(later - earlier > 1 for earlier, later in itertools.pairwise(turns)), "two were placed in one turn"


# Prompts that can never fit


async def test_a_prompt_that_no_store_takes_is_computed_where_it_is_decoded_or_refused_at_once(make_bench: Any, peers: Any) -> None:
    for local_prefill in ("fallback", "never"):
        bench = await make_bench(0, 0, local_prefill=local_prefill)
        await lose(bench, bench.stores[0])
        bench.stores[0].kv_capacity_tokens = 8
        await bench.join(bench.stores[0])
        await bench.add("prefill", bench.stores[0])
        await bench.add("decode", bench.stores[0])
        fits, too_long = bench.request(list(range(20, 28))), bench.request(list(range(20, 29)))
        assert (await within(2, peers.read(bench.router.open(fits))))[1].phases.prefill_worker == "prefill-0"
        if local_prefill == "fallback":
            _, finished = await within(2, peers.read(bench.router.open(too_long)))
            assert finished.phases.transport == "local" and not bench.decodes[0].requests[1].skip_own_store
        else:
            with pytest.raises(
                PromptTooLong, match=r"9 tokens fit no KV store; the largest takes a hand-off of 8; .*store\.arena_bytes"
            ) as caught:
                bench.router.open(too_long)
            assert not caught.value.retryable
        assert len(bench.prefills[0].requests) == 1


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_hand_off_that_can_never_fit_is_not_tried_again_whoever_says_so_first(bench: Any, peers: Any, leg: str) -> None:
    """The store's size was not known to the proxy. Decode hears of it by the hand-off's abort."""
    never = PromptTooLong("7 blocks can never fit: the arena has 6 slots")

    async def refuse(_: Any) -> None:
        if leg == "prefill":
            raise never
        fields = {"reason": never.code, "reason_message": never.message, "reason_fields": never.fields}
        bench.board.at(bench.prefills[0].requests[0].handoff).set_exception(HandoffAborted(f"aborted: {never.message}", **fields))
        await peers.forever()

    bench.prefills[0].before_seal = refuse
    with pytest.raises(PromptTooLong, match=r"slots$"):
        await within(2, peers.read(bench.router.open(bench.request())))
    assert len(bench.prefills[0].requests) == 1


async def test_without_a_store_and_without_local_prefill_new_requests_are_refused_at_once(make_bench: Any) -> None:
    bench = await make_bench(local_prefill="never")
    await lose(bench, bench.stores[0])
    with pytest.raises(NoWorker, match="no live KV store"):
        bench.router.open(bench.request())
