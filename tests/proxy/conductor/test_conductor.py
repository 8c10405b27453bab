"""The Conductor: pure, and what it answers whatever the policy."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.errors import ERROR_TYPES, NoWorker, PromptTooLong
from halfmoon.proxy.conductor.conductor import Conductor
from halfmoon.proxy.conductor.placement import MemberState, Placement, PlacementRequest, PrefixHint, Rejection, Snapshot
from halfmoon.proxy.conductor.policies import POLICIES, create_policy
from halfmoon.proxy.conductor.policies.base import best_prefix
from halfmoon.proxy.conductor.predictors import Predictors

BLOCK_SIZE = 16


def worker(role: str, number: int, tokens: int = 0, capacity: int = 0, store: int | None = None) -> MemberState:
    return MemberState(f"{role}-{number}", f"{role}-{number}.1", f"store-{number if store is None else store}", tokens, capacity)


def pool(role: str) -> st.SearchStrategy[tuple[MemberState, ...]]:
    loads = st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([0, 100, 1000, 10**6])), max_size=5)
    return loads.map(lambda found: tuple(worker(role, number, *load) for number, load in enumerate(found)))


@st.composite
def questions(draw: st.DrawFn) -> tuple[PlacementRequest, Snapshot]:
    snapshot = Snapshot.of(draw(pool("prefill")), draw(pool("decode")), BLOCK_SIZE)
    incarnations = [member.incarnation for member in (*snapshot.prefill, *snapshot.decode)]
    some = st.frozensets(st.sampled_from(incarnations)) if incarnations else st.just(frozenset[str]())
    num_tokens = draw(st.integers(1, 2000))
    held = draw(st.dictionaries(st.integers(0, 6).map(lambda number: f"store-{number}"), st.integers(1, num_tokens // BLOCK_SIZE + 1)))
    return PlacementRequest(num_tokens, held, draw(some), draw(some)), snapshot


@pytest.mark.parametrize("name", POLICIES)
@given(question=questions())
@settings(max_examples=60)
def test_an_answer_is_a_fitting_pair_or_says_what_is_missing(name: str, question: tuple[PlacementRequest, Snapshot]) -> None:
    request, snapshot = question
    answer = Conductor(create_policy(name, random.Random(0))).place(request, snapshot)

    def fits(member: MemberState) -> bool:
        return member.incarnation not in request.exclude and not 0 < member.kv_capacity_tokens < request.num_tokens

    fitting = [[member for member in members if fits(member)] for members in (snapshot.prefill, snapshot.decode)]
    if isinstance(answer, Rejection):
        assert not all(fitting)
        assert ERROR_TYPES[answer.code] in (NoWorker, PromptTooLong)
        return
    for chosen, candidates in zip((answer.prefill, answer.decode), fitting, strict=True):
        assert chosen in candidates
        unsuspected = [member for member in candidates if member.incarnation not in request.avoid]
        assert chosen in unsuspected or not unsuspected
    assert answer.reason.startswith(f"{name}: ")
    assert 0 <= answer.num_cached_tokens < request.num_tokens, "the last token is always computed"
    if answer.prefix is not None:
        assert answer.prefix.num_blocks <= request.held_blocks[answer.prefix.store_address]
        assert answer.prefix.store_address != answer.prefill.store_address


@pytest.mark.parametrize("name", POLICIES)
@given(questions=st.lists(questions(), max_size=6))
@settings(max_examples=25)
def test_equal_histories_give_equal_answers(name: str, questions: list[tuple[PlacementRequest, Snapshot]]) -> None:
    one, other = (Conductor(create_policy(name, random.Random(5))) for _ in range(2))
    assert [one.place(*question) for question in questions] == [other.place(*question) for question in questions]


def test_a_retry_never_goes_to_an_excluded_process() -> None:
    snapshot = Snapshot.of((worker("prefill", 0), worker("prefill", 1)), (worker("decode", 0),), BLOCK_SIZE)
    answer = Conductor(create_policy("least_loaded", random.Random(0))).place(
        PlacementRequest(10, exclude=frozenset({"prefill-0.1"})), snapshot
    )
    assert isinstance(answer, Placement) and answer.prefill.id == "prefill-1"
    answer = Conductor(create_policy("least_loaded", random.Random(0))).place(
        PlacementRequest(10, exclude=frozenset({"decode-0.1"})), snapshot
    )
    assert answer == Rejection("no_worker", answer.reason)
    assert "no live decode worker" in answer.reason and "the 1 that failed this request" in answer.reason


def test_a_prompt_that_fits_nowhere_is_too_long_and_not_unlucky() -> None:
    snapshot = Snapshot.of((worker("prefill", 0, capacity=64),), (worker("decode", 0, capacity=640),), BLOCK_SIZE)
    answer = Conductor(create_policy("cache_aware", random.Random(0))).place(PlacementRequest(65), snapshot)
    assert isinstance(answer, Rejection) and answer.code == "prompt_too_long" and "holds 64" in answer.reason


def test_expected_cached_tokens_count_the_hint_and_never_the_last_token() -> None:
    snapshot = Snapshot.of((worker("prefill", 0),), (worker("decode", 0),), BLOCK_SIZE)
    conductor = Conductor(create_policy("cache_aware", random.Random(0)))
    answer = conductor.place(PlacementRequest(64, {"store-0": 1, "store-1": 4}), snapshot)
    assert isinstance(answer, Placement)
    assert answer.prefix == PrefixHint("store-1", 3) and answer.num_cached_tokens == 48
    answer = conductor.place(PlacementRequest(65, {"store-0": 4, "store-1": 4}), snapshot)
    assert isinstance(answer, Placement)
    assert answer.prefix is None and answer.num_cached_tokens == 64


def test_the_simulator_can_import_it_without_grpc_torch_or_ray() -> None:
    script = (
        "import sys\n"
        "import halfmoon.proxy.conductor.conductor, halfmoon.proxy.conductor.assigned_load, halfmoon.proxy.prefixes.index\n"
        "print(sorted({'grpc', 'torch', 'ray', 'prometheus_client', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    assert done.stdout.strip() == "[]"


def test_a_request_that_fills_a_worker_exactly_fits_and_one_token_more_does_not() -> None:
    snapshot = Snapshot.of((worker("prefill", 0, capacity=100),), (worker("decode", 0, capacity=100),), BLOCK_SIZE)
    conductor = Conductor(create_policy("least_loaded", random.Random(0)))
    assert isinstance(conductor.place(PlacementRequest(100), snapshot), Placement)
    answer = conductor.place(PlacementRequest(101), snapshot)
    assert isinstance(answer, Rejection) and answer.code == "prompt_too_long"


def test_of_two_stores_that_hold_as_much_the_first_address_is_named() -> None:
    assert best_prefix(PlacementRequest(100, {"b": 3, "a": 3, "c": 2}), BLOCK_SIZE) == ("a", 3)
    assert best_prefix(PlacementRequest(33, {"b": 3}), BLOCK_SIZE) == ("b", 2), "the last token is always computed"


def test_a_decode_worker_that_prefills_by_the_policy_s_choice_is_told_of_no_other_store() -> None:
    busy = MemberState("p", "p", "sp", busy_until_s=1000.0, role="prefill")
    free = MemberState("d", "d", "sd", busy_until_s=0.0, role="decode")
    snapshot = Snapshot.of((busy,), (free,), BLOCK_SIZE)
    predictors = Predictors.guess()
    conductor = Conductor(create_policy("adaptive", random.Random(0), predictors), None, predictors, local_prefill="fallback")
    answer = conductor.place(PlacementRequest(200, {"sp": 10, "sd": 2}), snapshot)
    assert isinstance(answer, Placement) and answer.is_local and answer.prefix is None
    assert answer.num_cached_tokens == 2 * BLOCK_SIZE
    assert answer.ttft_s == pytest.approx(predictors.prefill.predict(200 - 32, 32)), "of what it really computes"
