from __future__ import annotations

import itertools
import math

import pytest

from halfmoon.protocol.errors import InternalError, NoWorker, Overloaded, PromptTooLong
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.verdict import Terms, judge_done, judge_error, judge_left

BOTH = Terms(Slo(1.0, 0.1), "own")


@pytest.mark.parametrize(("ttft_s", "tpot_s"), itertools.product((0.5, 1.0, 1.5), (0.05, 0.1, 0.2)))
def test_a_request_is_in_its_slo_where_it_kept_each_bound(ttft_s: float, tpot_s: float) -> None:
    verdict = judge_done(BOTH, common_pb2.PhaseRecord(ttft_s=ttft_s, tpot_s=tpot_s), 10)
    late = {"ttft" for _ in range(ttft_s > 1.0)} | {"tpot" for _ in range(tpot_s > 0.1)}
    assert verdict.in_slo == ("no" if late else "yes") and verdict.slo_class == "own"
    assert {verdict.miss} == ({"both"} if len(late) == 2 else late or {"none"})
    assert (verdict.ttft_met, verdict.tpot_met) == ("ttft" not in late, "tpot" not in late)


def test_a_bound_that_it_did_not_have_is_not_judged() -> None:
    verdict = judge_done(Terms(Slo(ttft_s=1.0), "default"), common_pb2.PhaseRecord(ttft_s=2.0, tpot_s=9.0), 10)
    assert (verdict.miss, verdict.ttft_met, verdict.tpot_met) == ("ttft", False, None)
    assert judge_done(Terms(), common_pb2.PhaseRecord(ttft_s=math.inf), 3).in_slo == "yes"


def test_an_answer_without_a_token_was_not_late() -> None:
    assert judge_done(BOTH, common_pb2.PhaseRecord(e2e_s=9.0), 0).in_slo == "yes"


@pytest.mark.parametrize("error", [NoWorker("none"), InternalError("bug"), Overloaded("full"), None])
def test_what_the_cluster_did_not_serve_met_no_bound(error: Exception | None) -> None:
    verdict = judge_error(BOTH, error, rejected=isinstance(error, Overloaded))  # pyright: ignore[reportArgumentType]
    assert (verdict.in_slo, verdict.ttft_met, verdict.tpot_met) == ("no", False, False)
    assert verdict.miss == ("rejected" if isinstance(error, Overloaded) else "error")


def test_what_the_client_asked_wrong_is_not_the_clusters_miss() -> None:
    verdict = judge_error(BOTH, PromptTooLong("long"), rejected=True)
    assert (verdict.in_slo, verdict.miss, verdict.ttft_met) == ("unknown", "invalid", None)


def test_a_client_that_left_is_a_miss_only_where_its_first_token_was_late_already() -> None:
    assert judge_left(BOTH, 0.9).in_slo == "unknown" and judge_left(BOTH, None).miss == "left"
    assert judge_left(BOTH, 1.1)[1:4] == ("no", "ttft", False)
