"""Why a request went where it went, over a real Control listener: candidates, choice, rejection, what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from halfmoon.client import AsyncClient, Control, Explanation, UnknownRequest
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.errors import NoWorker, Overloaded
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.backlog import QueuePlace
from halfmoon.proxy.conductor.placement import NO_SLO, MemberState, PlacementRequest, Rejection, Snapshot
from halfmoon.proxy.conductor.predictors import Predictors
from halfmoon.proxy.request import ProxyRequest, RequestState
from halfmoon.proxy.requests.decisions import NUM_KEPT, DecisionLog
from halfmoon.tests.waiting import within

GUESS = Predictors.guess().model


@pytest.fixture
async def explain(make_bench: Any) -> AsyncIterator[Any]:
    clients: list[AsyncClient] = []

    async def ask(bench: Any, request_id: str) -> list[Explanation]:
        clients.append(AsyncClient(bench.address, control=Control(bench.address, "no-token-is-asked-for-by-this-bench")))
        return await clients[-1].explain(request_id)

    yield ask
    for client in clients:
        await client.close()


async def test_every_candidate_is_shown_with_its_predictions_and_the_chosen_with_what_came_of_them(
    make_bench: Any, peers: Any, explain: Any
) -> None:
    bench = await make_bench(2, 2, policy="kvcache_centric", order="fair")
    request = bench.request(list(range(50, 70)))
    keys = block_keys(root_key(peers.SCHEMA.fingerprint), request.token_ids, 4)
    index = bench.router._index
    index.change(bench.stores[0].address, keys[:3], ())
    busy = bench.cluster.members["prefill-0"].backlog.place(4000, 7.0, QueuePlace(0), asyncio.get_running_loop().time())
    running = bench.cluster.members["decode-0"].context.place(500)
    running.begin()
    for prefill in bench.prefills:
        prefill.phases = common_pb2.PrefillPhases(queue_s=1e-6, prefill_s=2e-6, compute_s=2e-6)
    _, finished = await within(5, peers.read(bench.router.open(request)))
    (found,) = await explain(bench, request.request_id)
    assert (found.request_id, found.state, found.ended, found.num_tokens) == (request.request_id, "done", "length", 20)
    assert (found.policy, found.admission, found.ttft_slo_s) == ("kvcache_centric", "none", 0.0)
    (attempt,) = found.attempts
    assert [(one.id, one.chosen, one.num_cached_blocks) for one in attempt.prefill] == [("prefill-0", False, 3), ("prefill-1", True, 3)]
    waiting, chosen = attempt.prefill
    alone_s = GUESS.prefill_time(8, 12)
    assert chosen.prefill_s == pytest.approx(alone_s) and chosen.ttft_s == pytest.approx(alone_s) and chosen.transfer_s == 0.0
    assert waiting.queue_s == pytest.approx(alone_s), "its equal shares the steps with it, for as long as it takes itself"
    assert waiting.num_outstanding_tokens == 4000
    assert [one.chosen for one in attempt.decode] == [False, True] and attempt.decode[0].num_running == 1
    assert attempt.decode[0].step_s == pytest.approx(GUESS.step_time(2, 520)) and attempt.decode[1].step_s == pytest.approx(
        GUESS.step_time(1, 20)
    )
    assert attempt.num_cached_tokens == 12 and attempt.reason == finished.phases.placement_reason and not attempt.rejection_code
    by_name = {one.name: one for one in attempt.predictions}
    assert by_name["ttft"].measured_s == finished.phases.ttft_s and by_name["tpot"].measured_s == finished.phases.tpot_s
    promised = by_name["promised"]
    assert promised.measured_s == finished.phases.ttft_s and promised.predicted_s == by_name["ttft"].predicted_s, (
        "nothing is known to be late"
    )
    assert by_name["prefill"].measured_s == 2e-6
    assert by_name["prefill"].relative_error == pytest.approx((alone_s - 2e-6) / 2e-6)
    assert found.phases == type(found.phases).from_proto(finished.phases)
    busy.end(asyncio.get_running_loop().time())
    running.end()


async def test_what_is_explained_is_what_was_predicted_then_whatever_was_learnt_since(make_bench: Any, peers: Any, explain: Any) -> None:
    bench = await make_bench(policy="kvcache_centric")
    request = bench.request()
    await within(5, peers.read(bench.router.open(request)))
    before = (await explain(bench, request.request_id))[0].attempts[0].prefill
    predictors = bench.router.predictors
    predictors.prefill.rescale(1000.0)
    assert predictors.prefill.predict(10, 0) > 100 * before[0].prefill_s
    assert (await explain(bench, request.request_id))[0].attempts[0].prefill == before


async def test_a_replay_shows_both_attempts_and_what_ended_the_first(make_bench: Any, peers: Any, explain: Any) -> None:
    bench = await make_bench(2, 1, policy="round_robin")
    bench.prefills[0].before_seal = peers.forever
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.prefills[0].arrived.wait())
    (running,) = await explain(bench, request.request_id)
    assert (running.state, running.ended, len(running.attempts)) == ("prefill", "", 1)
    await bench.prefills[0].kill()
    await within(2, peers.read(stream))
    (found,) = await explain(bench, request.request_id)
    first, second = found.attempts
    assert "prefill-0" in first.error and all(one.measured_s is None for one in first.predictions)
    assert [one.id for one in second.prefill if one.chosen] == ["prefill-1"] and not second.error
    assert second.at_s > first.at_s


async def test_refused_requests_are_explained_too(make_bench: Any, peers: Any, explain: Any, tmp_path: Any) -> None:
    GUESS.save(tmp_path / "profile.json")
    bench = await make_bench(admission="ttft_tbt", ttft_slo_s=1e-4, max_queued_requests=1, cost_model=str(tmp_path / "profile.json"))
    late = bench.request()
    with pytest.raises(Overloaded):
        bench.router.open(late)
    (found,) = await explain(bench, late.request_id)
    (attempt,) = found.attempts
    assert found.state == "rejected" and attempt.rejection_code == "overloaded" and attempt.retry_after_s > 0
    assert "the SLO is 0.0001 s" in attempt.reason and len(attempt.prefill) == 1 and not attempt.prefill[0].chosen
    assert {one.name for one in attempt.predictions} == {"ttft", "tpot"}
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(bench.request(slo=(60.0, None)))
    queued = bench.request(slo=(60.0, None))
    with pytest.raises(Overloaded):
        bench.router.open(queued)
    (found,) = await explain(bench, queued.request_id)
    assert found.attempts == () and found.ended.startswith("overloaded: 1 requests wait for their first token")
    await stream.cancel("enough")
    await bench.decodes[0].leave()
    async with asyncio.timeout(60):
        while "decode-0" in bench.cluster.members:
            await asyncio.sleep(0.01)
    nowhere = bench.request()
    with pytest.raises(NoWorker):
        bench.router.open(nowhere)
    (found,) = await explain(bench, nowhere.request_id)
    assert found.attempts[0].rejection_code == "no_worker"


async def test_an_unknown_request_is_an_error_that_says_how_many_are_remembered(make_bench: Any, peers: Any, explain: Any) -> None:
    bench = await make_bench(num_explained=2)
    for _ in range(3):
        await within(5, peers.read(bench.router.open(bench.request())))
    with pytest.raises(UnknownRequest, match="no request 'request-1' is among the last 2"):
        await explain(bench, "request-1")
    assert [one.request_id for one in await explain(bench, "request-3")] == ["request-3"]


def request(request_id: str, peers: Any = None) -> ProxyRequest:
    return ProxyRequest(request_id, [1, 2], None, 1.0)  # type: ignore[arg-type]


def test_the_choices_of_a_request_are_found_by_its_own_id_and_an_id_used_twice_by_its_last() -> None:
    log = DecisionLog(4)
    for name in ("a-0", "a-1", "b", "b"):
        log.open(request(name), NO_SLO)
    assert [one.request_id for one in log.find("a")] == ["a-0", "a-1"]
    last = log.find("b")[0]
    log.open(request("c"), NO_SLO)
    log.open(request("d"), NO_SLO)
    log.open(request("e"), NO_SLO)
    assert log.find("b") == [last] and len(log) == 4
    with pytest.raises(UnknownRequest):
        log.find("a")


def test_of_many_candidates_the_chosen_and_the_least_loaded_are_kept() -> None:
    log = DecisionLog(1)
    pool = tuple(MemberState(f"p{number:03}", f"p{number}.1", "s", busy_until_s=float(100 - number)) for number in range(100))
    decision = log.open(request("a"), NO_SLO)
    asked = PlacementRequest(2)
    attempt = decision.decided(asked, Snapshot.of(pool, pool[:3], 4), Predictors.guess(), Rejection("overloaded", "no"))
    assert [member.id for member in attempt.seen.prefill] == [f"p{number:03}" for number in range(99, 99 - NUM_KEPT + 1, -1)]
    assert (attempt.num_prefill, attempt.num_decode, len(attempt.seen.decode)) == (100, 3, 3)
    decision.end(RequestState.REJECTED, "no")
    assert decision.state == "rejected"
