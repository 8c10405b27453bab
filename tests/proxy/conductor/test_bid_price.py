"""Worker-seconds by hand, and what must hold for every load."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfmoon.proxy.conductor.admission import create_admission
from halfmoon.proxy.conductor.admission.bid_price import FREE, BidPrice, Take
from halfmoon.proxy.conductor.forecast import Forecast
from halfmoon.proxy.conductor.placement import MemberState, PlacementRequest, PrefixHint, Selection, Slo, Snapshot
from halfmoon.proxy.conductor.predictors import CostModel, Predictors

MODEL = CostModel(
    per_token_s=1e-3, per_token_prefix_s=0.0, per_token_squared_s=0.0, step_s=0.02, per_sequence_s=1e-3, per_kv_token_s=1e-6,
    kv_bytes_per_token=1000, kv_capacity_tokens=10**5, cache_tokens=10**6, link_bytes_per_s=1e9,
)  # fmt: skip
SLO = Slo(10.0, 0.070)  # 50 ms of a step to give away, times the share
DECODE_S = 8.0


def cluster(now_s: float, *, queued_s: float = 0.0, running: int = 0, tokens: int = 0, role: str = "") -> Snapshot:
    prefill = MemberState("p", "p", "sp", busy_until_s=now_s + queued_s)
    decode = MemberState("d", "d", "sd", tokens, 10**5, None, running, running, tokens, role)
    return Snapshot.of((prefill,), (decode,), 100, now_s)


def ask(price: BidPrice, num_tokens: int, snapshot: Snapshot, priority: int = 0) -> bool:
    choice = Selection(snapshot.prefill[0], snapshot.decode[0], "")
    return price.ask(PlacementRequest(num_tokens, priority=priority), choice, snapshot, SLO, DECODE_S, DECODE_S)


def test_a_request_takes_the_worker_seconds_that_a_hand_computes() -> None:
    price = BidPrice(Predictors(MODEL), share=0.8)
    snapshot = cluster(0.0)
    choice = Selection(snapshot.prefill[0], snapshot.decode[0], "", PrefixHint("elsewhere", 30))
    take = price.take(PlacementRequest(5000), choice, snapshot, SLO, DECODE_S)
    assert take.prefill == pytest.approx(2.0)  # 2,000 of its tokens are cached nowhere
    assert take.steps == pytest.approx((1e-3 + 5e-3) / (0.8 * 0.050) * DECODE_S)
    assert take.pages == pytest.approx(5000 / 1e5 * DECODE_S)


def test_what_is_given_counts_what_stands_free_and_what_is_behind() -> None:
    price = BidPrice(Predictors(MODEL), share=0.8)
    idle = price.given(cluster(0.0), SLO, 60.0, DECODE_S)
    assert idle == pytest.approx((60.0 + 8.0, 60.0 + 8.0, 60.0 + 8.0))
    busy = price.given(cluster(0.0, queued_s=9.0, running=20, tokens=20_000), SLO, 60.0, DECODE_S)
    # 20 + 20 ms of 40 are stepped: nothing is free; a fifth of 100,000 tokens are paged
    assert busy == pytest.approx((60.0 - 1.0, 60.0, 60.0 + 0.8 * 8.0))


def test_workers_that_may_change_places_are_one_pool() -> None:
    price = BidPrice(Predictors(MODEL), share=0.8)
    snapshot = cluster(0.0, role="coupled")
    take = price.take(PlacementRequest(1000), Selection(snapshot.decode[0], snapshot.decode[0], ""), snapshot, SLO, DECODE_S)
    assert take.prefill == pytest.approx(1.0 + (1e-3 + 1e-3) / 0.040 * DECODE_S) and take.steps == take.pages == 0.0


def test_nothing_is_too_dear_while_there_is_room_for_all() -> None:
    price = BidPrice(Predictors(MODEL))
    assert not any(ask(price, 900, cluster(float(second))) for second in range(100))
    assert price.prices == FREE and price.limit == math.inf


def test_where_too_much_is_asked_for_the_largest_are_refused_and_the_others_not() -> None:
    # a small one takes a second of prefill, a large one ten; one of each a second: the small ones are all that one worker can do
    price = BidPrice(Predictors(MODEL))
    refused: list[int] = []
    for second in range(60):
        for num_tokens in (1000, 10_000):
            if ask(price, num_tokens, cluster(float(second), queued_s=8.0)):
                refused.append(num_tokens)
    assert set(refused) == {10_000}
    assert price.prices.prefill > 0.0
    assert ask(price, 10_000, cluster(60.0, queued_s=8.0)) and not ask(price, 10_000, cluster(60.0, queued_s=8.0), priority=-10)


def test_a_crowd_is_forgotten_when_the_horizon_is_behind_it() -> None:
    price = BidPrice(Predictors(MODEL))
    for second in range(30):
        for num_tokens in (2000, 10_000):
            ask(price, num_tokens, cluster(float(second)))
    assert ask(price, 10_000, cluster(31.0))
    assert not ask(price, 10_000, cluster(120.0))


def test_where_all_ask_for_the_same_nobody_is_dearer_than_the_others() -> None:
    price = BidPrice(Predictors(MODEL))
    assert not any(ask(price, 10_000, cluster(float(second))) for second in range(60))
    assert price.prices.prefill > 0.0, "it is left to the predictions of each request"


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 50_000), min_size=1, max_size=60),
    running=st.integers(0, 200),
    queued_s=st.floats(0.0, 500.0),
)
def test_those_below_the_limit_take_no_more_than_is_given_and_a_longer_one_is_never_cheaper(
    lengths: list[int], running: int, queued_s: float
) -> None:
    price = BidPrice(Predictors(MODEL), every_s=0.0)
    snapshot = cluster(0.0)
    for at, num_tokens in enumerate(lengths):
        snapshot = cluster(20.0 * at / len(lengths) + at, queued_s=queued_s, running=running, tokens=running * 500)
        ask(price, num_tokens, snapshot)
    choice = Selection(snapshot.prefill[0], snapshot.decode[0], "")
    takes = [price.take(PlacementRequest(num_tokens), choice, snapshot, SLO, DECODE_S) for num_tokens in sorted(lengths)]
    costs = [price.cost(take) for take in takes]
    assert costs == sorted(costs)
    if price.limit == math.inf:
        return
    recent = [Take(*take) for moment, *take in price.asked.rows.tolist() if moment >= snapshot.now_s - price.horizon_s]
    span_s = min(price.horizon_s, snapshot.now_s)
    given_s = price.given(snapshot, SLO, span_s, DECODE_S)
    taken = [take for take in recent if price.cost(take) < price.limit]
    for at in range(len(Take._fields)):
        assert sum(take[at] for take in taken) <= max(given_s[at], 0.0) + 1e-6


INT32 = st.integers(-(2**31), 2**31 - 1)


@given(priority=INT32, other=INT32)
@example(priority=1024, other=-1075)
@example(priority=2**31 - 1, other=-(2**31))
def test_every_priority_of_32_bits_has_a_price_and_a_more_urgent_one_is_never_dearer(priority: int, other: int) -> None:
    price = BidPrice(Predictors(MODEL), limit=1e-6, prices=Take(1.0, 0.0, 0.0), every_s=math.inf)
    price._next_s = math.inf
    assert ask(price, 50_000, cluster(0.0), priority), "no priority goes past a price that is a million times over the limit"
    assert 0.0 < BidPrice.weight(priority) < math.inf
    if priority <= other:
        assert BidPrice.weight(priority) <= BidPrice.weight(other)
    assert BidPrice.weight(0) == 1.0 and BidPrice.weight(1) == 2.0 and BidPrice.weight(-1) == 0.5


@pytest.mark.parametrize("priority", [-(2**31), -1075, 1024, 2**31 - 1])
def test_a_request_of_any_priority_is_judged_by_the_admission_that_prices(priority: int) -> None:
    admission = create_admission("predictive", SLO, Predictors(MODEL))
    assert admission is not None
    for _ in range(50):
        admission.observe_decode(8.0, 1000)
    snapshot = cluster(0.0)
    selection = Selection(snapshot.prefill[0], snapshot.decode[0], "")
    assert admission.judge(PlacementRequest(100, priority=priority), selection, Forecast(1.0, 0.02), snapshot) is None
