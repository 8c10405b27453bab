from __future__ import annotations

import random
from typing import get_args

import pytest

from halfmoon.protocol.config import AdmissionName
from halfmoon.proxy.conductor.admission import ADMISSIONS, Limits, Predictive, create_admission
from halfmoon.proxy.conductor.admission.decode_times import DecodeTimes
from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.forecast import Forecast
from halfmoon.proxy.conductor.placement import Arriving, MemberState, Placement, PlacementRequest, Rejection, Selection, Slo, Snapshot
from halfmoon.proxy.conductor.policies import create_policy
from halfmoon.proxy.conductor.predictors import CostModel, Predictors

MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.02, per_sequence_s=1e-3, per_kv_token_s=0.0,
    kv_bytes_per_token=1000, kv_capacity_tokens=10**6, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip
PREFILL = MemberState("p0", "p0", "s0", busy_until_s=5.0)
SLO = Slo(3.0, 0.030)


def decode(*num_running: int) -> tuple[MemberState, ...]:
    return tuple(MemberState(f"d{at}", f"d{at}", f"t{at}", num_requests=num, num_running=num) for at, num in enumerate(num_running))


def judge(name: str, ttft_s: float, tpot_s: float, snapshot: Snapshot, slo: Slo | None = None) -> Rejection | None:
    admission = create_admission(name, SLO, Predictors(MODEL))
    assert admission is not None and admission.name == name
    request = PlacementRequest(100, slo=slo)
    return admission.judge(request, Selection(PREFILL, snapshot.decode[0], ""), Forecast(ttft_s, tpot_s), snapshot)


def test_names_are_those_listed_and_of_the_configuration_and_others_are_refused() -> None:
    assert set(get_args(AdmissionName)) == set(ADMISSIONS)
    assert create_admission("none", SLO, Predictors(MODEL)) is None
    with pytest.raises(ValueError, match="two_stage"):
        create_admission("fastest", SLO, Predictors(MODEL))


@pytest.mark.parametrize("name", [name for name in ADMISSIONS if name != "none"])
def test_a_predicted_first_token_over_the_slo_is_rejected_with_how_late_it_would_be(name: str) -> None:
    snapshot = Snapshot.of((PREFILL,), decode(0), 64, now_s=4.0)
    rejection = judge(name, 3.5, 0.02, snapshot)
    assert rejection is not None and rejection.code == "overloaded"
    assert rejection.retry_after_s == pytest.approx(0.5)
    assert judge(name, 2.9, 0.02, snapshot) is None


@pytest.mark.parametrize("name", [name for name in ADMISSIONS if name != "none"])
def test_a_request_may_bring_its_own_slo(name: str) -> None:
    snapshot = Snapshot.of((PREFILL,), decode(0), 64)
    assert judge(name, 3.5, 0.02, snapshot, Slo(4.0, 0.03)) is None
    assert judge(name, 2.5, 0.02, snapshot, Slo(2.0, 0.03)) is not None


def test_ttft_tbt_looks_at_the_chosen_decode_worker_and_two_stage_at_none() -> None:
    snapshot = Snapshot.of((PREFILL,), decode(15, 0), 64)
    assert judge("ttft_tbt", 1.0, 0.036, snapshot) is not None
    assert judge("two_stage", 1.0, 0.036, snapshot) is None


def test_early_rejection_looks_at_the_mean_of_the_decode_pool_as_it_runs_now() -> None:
    # 20 ms + 1 ms a sequence: nine each and the request are at the SLO
    assert judge("early_rejection", 1.0, 0.0, Snapshot.of((PREFILL,), decode(14, 3), 64)) is None
    assert judge("early_rejection", 1.0, 0.0, Snapshot.of((PREFILL,), decode(15, 4), 64)) is not None


def test_predictive_counts_who_will_be_there_when_the_prefill_ends() -> None:
    admission = Predictive(Limits(SLO), Predictors(MODEL), DecodeTimes(10.0))
    now = 100.0
    leaving = (92.0, 95.0, 99.0)  # began; gone at 102, 105, 109
    arriving = (Arriving(101.0, 10), Arriving(104.0, 10))
    snapshot = Snapshot.of((PREFILL,), decode(3), 64, now, arriving, leaving)
    request = PlacementRequest(100)
    # at 101.5: three are still there, one has come, and the request
    assert admission.step_at(request, 1.5, snapshot) == pytest.approx(0.02 + 5e-3)
    # at 106: two are gone, both have come
    assert admission.step_at(request, 6.0, snapshot) == pytest.approx(0.02 + 4e-3)
    # at 111.5: all that ran are gone, and the first that came too
    assert admission.step_at(request, 11.5, snapshot) == pytest.approx(0.02 + 2e-3)


def test_the_conductor_answers_with_the_admissions_rejection_or_the_prediction() -> None:
    predictors = Predictors(MODEL)
    conductor = Conductor(
        create_policy("kvcache_centric", random.Random(0), predictors), create_admission("ttft_tbt", SLO, predictors), predictors
    )
    fits = conductor.place(PlacementRequest(1000), Snapshot.of((PREFILL,), decode(0), 64, now_s=4.0))
    assert isinstance(fits, Placement) and fits.ttft_s == pytest.approx(2.0) and fits.tpot_s == pytest.approx(0.021)
    late = conductor.place(PlacementRequest(1000), Snapshot.of((PREFILL,), decode(0), 64, now_s=2.0))
    assert isinstance(late, Rejection) and late.retry_after_s == pytest.approx(1.0)


def test_an_admission_without_predictors_is_refused() -> None:
    with pytest.raises(ValueError, match="predictors"):
        Conductor(create_policy("random", random.Random(0)), create_admission("ttft_tbt", SLO, Predictors(MODEL)))


def test_policies_that_predict_nothing_are_judged_by_the_forecast() -> None:
    predictors = Predictors(MODEL)
    conductor = Conductor(create_policy("least_loaded", random.Random(0)), create_admission("ttft_tbt", SLO, predictors), predictors)
    answer = conductor.place(PlacementRequest(1000), Snapshot.of((PREFILL,), decode(0), 64, now_s=2.0))
    assert isinstance(answer, Rejection) and "4.00 s" in answer.reason


@pytest.mark.parametrize("policy", ["least_loaded", "kvcache_centric", "adaptive"])
def test_loading_a_prefix_from_the_workers_own_store_is_in_the_prediction(policy: str) -> None:
    predictors = Predictors(MODEL)
    conductor = Conductor(create_policy(policy, random.Random(0), predictors), create_admission("ttft_tbt", SLO, predictors), predictors)
    request = PlacementRequest(1000, held_blocks={PREFILL.store_address: 15})
    snapshot = Snapshot.of((PREFILL,), decode(0), 64, now_s=100.0)
    before = conductor.place(request, snapshot)
    num_bytes = 960 * MODEL.kv_bytes_per_token
    for _ in range(20):
        predictors.transfer.observe(num_bytes, 0.3, "shm")
    after = conductor.place(request, snapshot)
    assert isinstance(before, Placement) and isinstance(after, Placement)
    assert before.ttft_s is not None and after.ttft_s == pytest.approx(before.ttft_s + 0.3, abs=0.02)


def test_predictive_refuses_the_largest_while_more_is_asked_for_than_can_be_served_and_says_when_to_come_back() -> None:
    admission = create_admission("predictive", SLO, Predictors(MODEL))
    assert isinstance(admission, Predictive)
    for _ in range(50):
        admission.observe_decode(8.0, 1000)
    answers: dict[int, list[Rejection | None]] = {700: [], 20_000: []}
    for second in range(60):
        snapshot = Snapshot.of((PREFILL,), decode(0), 64, now_s=float(second))
        for num_tokens, found in answers.items():
            request = PlacementRequest(num_tokens)
            found.append(admission.judge(request, Selection(PREFILL, snapshot.decode[0], ""), Forecast(1.0, 0.02), snapshot))
    assert answers[700] == [None] * 60
    refused = answers[20_000][-1]
    assert refused is not None and refused.code == "overloaded" and refused.retry_after_s > 0.0 and "20000 tokens" in refused.reason


def test_who_is_in_the_prefill_role_is_not_of_the_decode_pool() -> None:
    both = (*decode(15, 4), MemberState("x", "x", "x", role="prefill"))
    assert judge("early_rejection", 1.0, 0.0, Snapshot.of((PREFILL,), both, 64)) is not None
    assert judge("early_rejection", 1.0, 0.0, Snapshot.of((PREFILL,), (*decode(15, 4), MemberState("x", "x", "x")), 64)) is None
