"""The order of a prefill queue, as the one integer that a worker's scheduler sorts by (SequenceSpec.queue_order, lower is sooner).

fcfs   arrival                      edf   the moment by which the first token is due; more urgent classes first
late   edf, but a request that cannot be in time any more gives way to those that can, for GIVE_WAY times its SLO
Deadlines are moments, so what waits becomes the most urgent in the end: nothing starves.
"""

from __future__ import annotations

import math
from typing import Literal

Order = Literal["fcfs", "edf", "late"]
TICKS_PER_S = 1000
CLASS_S = 60.0  # that one step of priority counts for
NO_SLO_S = 30.0  # that a request without an SLO counts with
GIVE_WAY = 10.0


def queue_order(order: Order, *, arrival_s: float, ttft_slo_s: float, predicted_ttft_s: float | None = None, priority: int = 0) -> int:
    """arrival_s: on any clock, the same for all requests of a queue; predicted_ttft_s: from the arrival."""
    if order == "fcfs":
        return round(arrival_s * TICKS_PER_S)
    slo_s = ttft_slo_s if math.isfinite(ttft_slo_s) else NO_SLO_S
    if order == "late" and predicted_ttft_s is not None and predicted_ttft_s > slo_s:
        slo_s *= GIVE_WAY
    return round((arrival_s + slo_s + priority * CLASS_S) * TICKS_PER_S)
