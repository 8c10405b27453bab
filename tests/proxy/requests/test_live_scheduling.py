"""The Conductor with predictions, in the router over scripted peers: every number against one computed by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.errors import ConfigError, Overloaded
from halfmoon.protocol.timing.step_cost import StepWork, attention_of
from halfmoon.protocol.timing.step_limits import StepLimits
from halfmoon.protocol.v1 import common_pb2, control_pb2
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.proxy.request import RequestState
from halfmoon.tests.waiting import until, within

# nothing like the guess, so that a number that came from it would show
MODEL = CostModel(
    name="test", prefill_s=0.5, per_token_s=0.01, per_token_prefix_s=1e-4, per_token_squared_s=1e-4, step_s=0.04, per_sequence_s=0.002,
    per_kv_token_s=1e-5, kv_bytes_per_token=1, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=1e6, request_s=0.25,
)  # fmt: skip
ONE_PROMPT = StepLimits(10)  # of those below, in a step
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # of the peers' schema: layers, K and V, heads, head_dim, float32


@pytest.fixture
def profile(tmp_path: Any) -> str:
    MODEL.save(tmp_path / "model.json")
    return str(tmp_path / "model.json")


def explained(bench: Any, request: Any) -> Any:
    return bench.router.decisions.find(request.request_id)[0]


# what is predicted, and learnt


async def test_the_record_says_what_was_predicted_and_why(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(policy="kvcache_centric", cost_model=profile)
    _, finished = await within(5, peers.read(bench.router.open(bench.request())))
    record = finished.phases
    alone_s = 0.5 + 10 * 0.01 + 10 * 10 * 1e-4
    assert record.predicted_ttft_s - record.queue_s == pytest.approx(alone_s + 0.25), "the hand-off as the cost model has it"
    assert record.predicted_tpot_s == pytest.approx(0.04 + 0.002 + 10 * 1e-5)
    assert record.placement_reason.startswith("kvcache_centric: prefill-0 is predicted to give the first token in 0.610 s")
    error = abs(record.predicted_ttft_s - record.ttft_s) / record.ttft_s
    assert bench.sample("halfmoon_prediction_relative_error_sum", predictor="ttft") == pytest.approx(error)
    assert bench.sample("halfmoon_prediction_relative_error_mean", predictor="ttft") == pytest.approx(error)
    assert bench.sample("halfmoon_predicted_ttft_error_seconds_sum") == pytest.approx(abs(record.predicted_ttft_s - record.ttft_s))
    assert bench.sample("halfmoon_predicted_tpot_error_seconds_sum") == pytest.approx(abs(record.predicted_tpot_s - record.tpot_s))
    assert bench.sample("halfmoon_decisions_total", policy="kvcache_centric", kind="no_prefix") == 1


async def test_a_prefill_is_learnt_by_its_share_of_its_steps_and_a_load_by_its_bytes(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(cost_model=profile)
    bench.prefills[0].phases = common_pb2.PrefillPhases(
        queue_s=1e-6, prefix_load_s=2e-4, prefill_s=1e-5, compute_s=0.3, num_bytes_loaded=4 * TOKEN_BYTES, load_transport="shm"
    )
    _, finished = await within(5, peers.read(bench.router.open(bench.request())))
    predicted_s = MODEL.prefill_time(6, 4)
    relative = abs(predicted_s - 0.3) / 0.3
    assert bench.sample("halfmoon_prediction_relative_error_sum", predictor="prefill") == pytest.approx(relative)
    transfer_s = 4 * TOKEN_BYTES / 1e6
    assert bench.sample("halfmoon_prediction_relative_error_sum", predictor="transfer") == pytest.approx(abs(transfer_s - 2e-4) / 2e-4)
    rest_s = finished.phases.ttft_s - finished.phases.write_s - finished.phases.queue_s - 1e-6 - 2e-4 - 1e-5
    assert bench.sample("halfmoon_prediction_relative_error_sum", predictor="handoff") == pytest.approx(abs(0.25 - rest_s) / rest_s)
    predictors = bench.router.predictors
    assert predictors.prefill.error.num_observations == 1, "within the filter"
    assert abs(predictors.prefill.predict(6, 4) - 0.3) < abs(predicted_s - 0.3)
    assert finished.phases.prefill_compute_s == 0.3


async def test_steps_are_learnt_from_reports_those_that_also_computed_a_prompt_too(make_bench: Any, profile: str) -> None:
    bench = await make_bench(cost_model=profile)
    sample = control_pb2.StepSample(num_sequences=5, num_kv_tokens=1000, seconds=0.1)
    work = StepWork(64, attention_of(64, 0), 5, 1000)
    known_s = MODEL.step_cost.seconds(work)
    mixed = control_pb2.StepSample(
        num_sequences=5, num_kv_tokens=1000, num_prefill_tokens=64, prefill_attention=work.attention, seconds=known_s
    )
    bench.decodes[0].load = control_pb2.MemberLoad(steps=[sample, mixed])
    await until(lambda: bench.router.predictors.step.error.num_observations >= 2)
    bench.decodes[0].load = control_pb2.MemberLoad()
    first_s = 0.04 + 5 * 0.002 + 1000 * 1e-5
    assert first_s < bench.router.predictors.step.predict(5, 1000) < 0.11
    assert bench.router.predictors.step.cost.seconds(work) == pytest.approx(known_s, rel=0.1)


async def test_a_cost_model_that_is_not_there_is_told_at_the_start(make_bench: Any, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no cost model"):
        await make_bench(cost_model=str(tmp_path / "none.json"))


# admission


async def test_a_request_that_is_predicted_late_is_refused_in_words_and_numbers(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(admission="ttft_tbt", ttft_slo_s=0.5, cost_model=profile)
    request = bench.request()
    with pytest.raises(Overloaded, match=r"the first token is predicted in 0\.86 s, the SLO is 0\.5 s") as caught:
        bench.router.open(request)
    assert caught.value.retry_after_s == pytest.approx(0.86 - 0.5, abs=0.01)
    assert bench.sample("halfmoon_rejections_total", admission="ttft_tbt", code="overloaded") == 1
    assert bench.sample("halfmoon_requests_total", outcome="rejected", reason="overloaded") == 1
    bench.assert_at_rest()
    _, finished = await within(5, peers.read(bench.router.open(bench.request(slo=(2.0, None)))))
    assert finished.phases.num_attempts == 1, "its own SLO stands for the proxy's"
    with pytest.raises(Overloaded, match="decode would step in 42 ms on decode-0, the SLO is 41 ms"):
        bench.router.open(bench.request(slo=(2.0, 0.041)))
    assert bench.metrics.num_in_slo == 1 and bench.sample("halfmoon_slo_requests_total", slo="ttft", met="yes") == 1


async def test_choices_of_which_one_is_refused_leave_nothing_assigned_and_nothing_called(make_bench: Any, profile: str) -> None:
    bench = await make_bench(admission="ttft_tbt", ttft_slo_s=1.0, cost_model=profile)
    choices = [bench.request() for _ in range(3)]  # the second would wait for the first
    with pytest.raises(Overloaded):
        await bench.router.open_all(choices)
    bench.assert_at_rest()
    assert not bench.cluster.members["prefill-0"].backlog and not bench.prefills[0].requests
    assert {explained(bench, choice).state for choice in choices} == {"rejected"}
    stream = bench.router.open(choices[0])
    await stream.cancel("enough")


async def test_a_wrong_prediction_cannot_refuse_everybody_for_ever(
    make_bench: Any, peers: Any, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an idle cluster somebody is let in now and then, against the prediction, so that it is put right."""
    monkeypatch.setattr("halfmoon.proxy.requests.placer.PROBE_S", 1e9)
    bench = await make_bench(admission="two_stage", ttft_slo_s=0.5, tpot_slo_s=1e-3, cost_model=profile)
    with pytest.raises(Overloaded):
        bench.router.open(bench.request())
    bench.router._placer._next_probe_s = 0.0
    _, finished = await within(5, peers.read(bench.router.open(bench.request())))
    assert finished.phases.predicted_ttft_s > 0.5, "nor is it refused for its step when its prefill is done"
    with pytest.raises(Overloaded):
        bench.router.open(bench.request())
    guessing = await make_bench(admission="two_stage", ttft_slo_s=1e-6)
    first = guessing.router.open(guessing.request())
    with pytest.raises(Overloaded):
        guessing.router.open(guessing.request())  # the cluster is not idle
    await first.cancel("enough")
    await within(5, peers.read(guessing.router.open(guessing.request())))


async def test_a_replay_is_not_refused_for_its_slo(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(1, 2, admission="early_rejection", cost_model=profile)
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 2 else asyncio.sleep(0)
    request = bench.request(slo=(None, 0.05))
    stream = bench.router.open(request)
    first = await within(2, peers.take(stream, 2))
    load = bench.cluster.members["decode-1"].context.place(10**5)
    load.begin()
    with pytest.raises(Overloaded):
        bench.router.open(bench.request(slo=(None, 0.05)))
    await bench.decodes[0].kill()
    rest, _ = await within(2, peers.read(stream))
    assert first + rest == peers.answer(request)
    load.end()


async def test_when_the_prefill_is_done_and_decode_has_no_room_left_the_request_is_refused(
    make_bench: Any, peers: Any, profile: str
) -> None:
    bench = await make_bench(admission="two_stage", tpot_slo_s=0.05, cost_model=profile)
    seal = asyncio.Event()
    bench.prefills[0].before_seal = lambda _: seal.wait()
    bench.decodes[0].before_token = peers.forever
    bench.board.at = hold_back(bench.board)  # decode hears of the seal later than the proxy
    request = bench.request()
    stream = bench.router.open(request)
    await within(2, bench.decodes[0].arrived.wait())
    load = bench.cluster.members["decode-0"].context.place(900)
    load.begin()
    seal.set()
    step_ms = round((0.04 + 2 * 0.002 + 910 * 1e-5) * 1e3)
    with pytest.raises(Overloaded, match=rf"would now step in {step_ms} ms with it, the SLO is 50 ms") as caught:
        await within(2, peers.read(stream))
    assert stream.state is RequestState.REJECTED and caught.value.retry_after_s >= 0
    await within(2, bench.stores[0].aborted.wait())
    assert bench.sample("halfmoon_rejections_total", admission="two_stage", code="overloaded") == 1
    assert explained(bench, request).ended.startswith("overloaded: its prefill is done")
    load.end()
    bench.assert_at_rest()


def hold_back(board: Any) -> Any:
    futures: dict[Any, asyncio.Future[Any]] = {}

    def at(handoff: common_pb2.HandoffId) -> asyncio.Future[Any]:
        held = futures.setdefault((handoff.id, handoff.epoch, len(futures)), asyncio.get_running_loop().create_future())
        return held

    return at


async def test_predictive_sees_who_comes_who_runs_and_how_long_that_takes(
    make_bench: Any, peers: Any, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench(admission="predictive", ttft_slo_s=60.0, tpot_slo_s=1.0, cost_model=profile)
    heard: list[float] = []
    monkeypatch.setattr(type(bench.router.conductor.admission), "observe_decode", lambda self, seconds, num_tokens: heard.append(seconds))
    load_tracker = bench.router._placer.load_tracker
    seal = asyncio.Event()
    bench.prefills[0].before_seal = lambda _: seal.wait()
    bench.decodes[0].before_token = lambda index: peers.forever() if index == 3 else asyncio.sleep(0)
    stream = bench.router.open(bench.request())
    assert load_tracker.arriving.num_tokens.tolist() == [10] and len(load_tracker.began_s) == 0
    seal.set()
    await within(2, anext(stream))
    assert len(load_tracker.arriving.at_s) == 0 and len(load_tracker.began_s) == 1
    state = bench.cluster.members["decode-0"].state
    assert (state.num_requests, state.num_running) == (1, 1) and 10 < state.num_running_tokens <= 13
    await stream.cancel("enough")
    assert len(load_tracker.began_s) == 0 and not heard, "it did not come to its end"
    bench.decodes[0].before_token = lambda _: asyncio.sleep(0)
    _, finished = await within(2, peers.read(bench.router.open(bench.request())))
    assert len(heard) == 1 and 0 < heard[0] <= finished.phases.e2e_s


# order


async def test_queues_are_earliest_deadline_first_and_a_replay_keeps_its_place(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(2, 1, order="edf", policy="round_robin")
    bench.prefills[0].before_seal = peers.forever
    patient, urgent = bench.request(slo=(30.0, None)), bench.request(slo=(1.0, None))
    stream = bench.router.open(patient)
    await within(2, bench.prefills[0].arrived.wait())
    await within(2, peers.read(bench.router.open(urgent)))
    places = {one.sequence.request_id: one.sequence.queue_order for one in bench.prefills[0].requests + bench.prefills[1].requests}
    later_s = urgent.arrival - patient.arrival
    assert places[urgent.request_id] - places[patient.request_id] == pytest.approx((later_s + 1.0 - 30.0) * 1000, abs=1.01)
    await bench.prefills[0].kill()
    await within(2, peers.read(stream))
    replay = bench.prefills[1].requests[-1].sequence
    assert (replay.request_id, replay.queue_order) == (patient.request_id, places[patient.request_id])


async def test_an_urgent_request_is_predicted_behind_the_step_under_way_alone(make_bench: Any, profile: str, peers: Any) -> None:
    bench = await make_bench(order="edf", cost_model=profile, step_limits=ONE_PROMPT)
    bench.prefills[0].before_seal = peers.forever
    alone_s = MODEL.prefill_time(10, 0)
    streams, predicted = [], []
    for slo_s, priority in ((30.0, 0), (40.0, 0), (20.0, 0), (60.0, 0), (60.0, -2)):
        request = bench.request([int(slo_s) * 100 + priority + 7] * 10, slo=(slo_s, None), priority=priority)
        streams.append(bench.router.open(request))
        predicted.append(explained(bench, request).attempts[0].answer.ttft_s)
    ahead = [round((seconds - alone_s - 0.25) / alone_s, 1) for seconds in predicted]
    assert ahead == pytest.approx([0, 1, 1, 3, 1], abs=0.2), "the first has been computed for some milliseconds meanwhile"
    for stream in streams:
        await stream.cancel("enough")
    bench.assert_at_rest()


async def test_a_worker_s_own_order_by_what_is_due_is_what_a_first_token_is_predicted_by(make_bench: Any, profile: str, peers: Any) -> None:
    bench = await make_bench(cost_model=profile, step_limits=ONE_PROMPT)
    bench.prefills[0].before_seal = peers.forever
    alone_s = MODEL.prefill_time(10, 0)
    opened, answers = [], []
    for number, slo_s in enumerate((0.3, 30.0, 2.0, 0.3)):  # a prompt takes 0.61 s: the first and the last are late in any case
        request = bench.request([number + 7] * 10, slo=(slo_s, None))
        opened.append(bench.router.open(request))
        answers.append(explained(bench, request).attempts[0].answer)
    assert [answer.prefill.gives_way for answer in answers] == [True, False, False, True]
    ahead = [round((answer.ttft_s - alone_s - 0.25) / alone_s, 1) for answer in answers]
    # before the second is the step under way, before the third the second, whose place is sooner, and before the last everybody
    assert ahead == pytest.approx([0, 1, 1, 3], abs=0.45), "prompts; a part of the first is computed meanwhile"
    for stream in opened:
        await stream.cancel("enough")
    bench.assert_at_rest()


async def test_who_will_be_late_in_any_case_gives_way_and_is_told_so(make_bench: Any, profile: str, peers: Any) -> None:
    bench = await make_bench(order="late", cost_model=profile, step_limits=ONE_PROMPT)
    bench.prefills[0].before_seal = peers.forever
    opened = [bench.router.open(bench.request([5] * 10, slo=(0.7, None)))]  # late: it takes 0.86 s
    late = bench.request([6] * 10, slo=(3.0, None))
    opened.append(bench.router.open(late))  # in time, before the late one
    attempt, first = explained(bench, late).attempts[0], bench.router.decisions.find("request-1")[0].attempts[0]
    assert attempt.asked.place.queue_order < first.asked.place.queue_order and attempt.answer.ttft_s == pytest.approx(0.86 + 0.61, abs=0.05)
    for stream in opened:
        await stream.cancel("enough")


# policies


async def test_adaptive_lets_an_idle_decode_worker_prefill_when_that_is_sooner(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(policy="adaptive", cost_model=profile, order="fcfs")
    bench.prefills[0].before_seal = peers.forever
    held = bench.router.open(bench.request([3] * 200))
    await within(2, bench.prefills[0].arrived.wait())
    request = bench.request()
    token_ids, finished = await within(5, peers.read(bench.router.open(request)))
    assert token_ids == peers.answer(request)
    assert sorted(one.local_prefill for one in bench.decodes[0].requests) == [False, True] and len(bench.prefills[0].requests) == 1
    assert (finished.phases.prefill_worker, finished.phases.transport) == ("decode-0", "local")
    assert "in its own decode batch" in finished.phases.placement_reason
    assert finished.phases.predicted_ttft_s - finished.phases.queue_s < 2 * MODEL.prefill_time(10, 0), "no hand-off, no queue"
    assert bench.sample("halfmoon_decisions_total", policy="adaptive", kind="local") == 1
    await held.cancel("enough")
    bench.assert_at_rest()


async def test_adaptive_keeps_to_prefill_workers_where_local_prefill_is_forbidden(make_bench: Any, peers: Any, profile: str) -> None:
    bench = await make_bench(policy="adaptive", cost_model=profile, local_prefill="never")
    bench.prefills[0].before_seal = peers.forever
    streams = [bench.router.open(bench.request([3 + number] * 200)) for number in range(3)]
    for stream in streams:
        assert not stream._runner._pair.is_local
        await stream.cancel("enough")


async def test_a_longer_prefix_in_another_store_is_named_to_the_prefill_worker(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(policy="kvcache_centric")
    other = await bench.add("store")
    request = bench.request(list(range(50, 70)))
    keys = block_keys(root_key(peers.SCHEMA.fingerprint), request.token_ids, 4)
    other.publish(stored=keys[:3])
    bench.stores[0].publish(stored=keys[:1])
    index = bench.router._index
    await until(lambda: index.leading_runs(keys) == {other.address: 3, bench.stores[0].address: 1})
    await within(5, peers.read(bench.router.open(request)))
    hint = bench.prefills[0].requests[0].prefix
    assert (hint.store_address, hint.num_blocks) == (other.address, 3)
    assert bench.sample("halfmoon_decisions_total", policy="kvcache_centric", kind="remote_prefix") == 1


async def test_blocks_are_expected_where_they_will_stand_and_no_more_when_the_attempt_fails(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(max_attempts=1)
    bench.prefills[0].before_seal = peers.forever
    index = bench.router._index
    keys = block_keys(root_key(peers.SCHEMA.fingerprint), list(range(20, 30)), 4)
    address = bench.stores[0].address
    await until(lambda: bench.stores[0].num_watches == 1)
    bench.stores[0].publish(stored=[b"another"])
    await until(lambda: len(index))
    stream = bench.router.open(bench.request())
    assert index.leading_runs(keys) == {address: 2}
    await stream.cancel("enough")
    assert index.leading_runs(keys) == {}
