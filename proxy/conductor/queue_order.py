"""The order of a prefill queue: the one integer that a worker's scheduler sorts by (SequenceSpec.queue_order, lower is sooner), and when a
first token is due.

fcfs   arrival                      edf   the moment by which the first token is due; more urgent classes first
late   edf, but a request that cannot be in time any more gives way to those that can, for GIVE_WAY times its SLO
short  the shortest first: a prompt lets those pass that come within AGEING times as long as it takes longer to compute. That is the
       place; the worker itself lets as many as can be have their first token in time (protocol/timing/turns.py)
All are moments, so what waits becomes the most urgent in the end: nothing starves.
"""

from __future__ import annotations

import math
from typing import Literal

Order = Literal["fcfs", "edf", "late", "short"]
TICKS_PER_S = 1000
CLASS_S = 60.0  # that one step of priority counts for
NO_SLO_S = 30.0  # that a request without an SLO counts with
GIVE_WAY = 10.0
AGEING = 5.0  # more serves the median sooner, and lets a few prompts of a hundred wait for half a minute near saturation
LONGEST_S = 120.0  # that the longest prompt lets others pass
DUE_SHARE = 0.97  # of the TTFT in the SLO, by which a worker is to be done: the rest is the way to the client


def queue_order(
    order: Order,
    *,
    arrival_s: float,
    ttft_slo_s: float,
    predicted_ttft_s: float | None = None,
    work_s: float = 0.0,
    priority: int = 0,
) -> int:
    """
    Args:
        arrival_s: on any clock, the same for all requests of a queue.
        predicted_ttft_s: from the arrival.
        work_s: predicted seconds of the prefill alone, what is cached left out.
    """
    if order == "fcfs":
        return round(arrival_s * TICKS_PER_S)
    if order == "short":
        waits_s = min(AGEING * work_s, LONGEST_S)
    else:
        waits_s = ttft_slo_s if math.isfinite(ttft_slo_s) else NO_SLO_S
        if order == "late" and predicted_ttft_s is not None and predicted_ttft_s > ttft_slo_s:
            waits_s *= GIVE_WAY
    return round((arrival_s + waits_s + priority * CLASS_S) * TICKS_PER_S)


def first_token_due_s(order: Order, *, arrival_s: float, ttft_slo_s: float, work_s: float = 0.0) -> float:
    """On the clock of arrival_s. inf: the queue order alone says when."""
    if order != "short":
        return math.inf
    own_s = NO_SLO_S + min(AGEING * work_s, LONGEST_S)
    return arrival_s + (DUE_SHARE * ttft_slo_s if math.isfinite(ttft_slo_s) else own_s)
