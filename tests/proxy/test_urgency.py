from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from halfmoon.proxy.urgency import GIVE_WAY, urgency

moments = st.floats(0, 1e5, allow_nan=False)


@given(first=moments, later=moments)
def test_with_one_slo_for_all_earliest_deadline_is_first_come_first_served(first: float, later: float) -> None:
    for order in ("fcfs", "edf"):
        one, other = (urgency(order, arrival_s=moment, ttft_slo_s=30.0) for moment in sorted((first, later)))
        assert one <= other


def test_a_tighter_slo_and_a_more_urgent_class_go_before() -> None:
    usual = urgency("edf", arrival_s=10.0, ttft_slo_s=30.0)
    assert urgency("edf", arrival_s=12.0, ttft_slo_s=5.0) < usual
    assert urgency("edf", arrival_s=12.0, ttft_slo_s=30.0, priority=-1) < usual
    assert urgency("edf", arrival_s=9.0, ttft_slo_s=math.inf) < usual, "no SLO counts as some"


@given(arrival=moments, slo=st.floats(0.1, 60), predicted=st.floats(0, 1e4))
def test_who_is_too_late_anyway_gives_way_but_not_for_ever(arrival: float, slo: float, predicted: float) -> None:
    found = urgency("late", arrival_s=arrival, ttft_slo_s=slo, predicted_ttft_s=predicted)
    in_time = urgency("edf", arrival_s=arrival, ttft_slo_s=slo)
    assert (found == in_time) if predicted <= slo else (found > in_time)
    # whoever comes after its extended deadline goes behind it: nothing starves
    assert found <= urgency("late", arrival_s=arrival + GIVE_WAY * slo, ttft_slo_s=slo, predicted_ttft_s=0.0)
