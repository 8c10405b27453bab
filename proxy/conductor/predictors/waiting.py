"""Predictions about the workers that a snapshot shows: one of them, or a whole pool at once."""

from __future__ import annotations

import numpy as np

from ..member_state import MemberState
from ..pool import Floats, Pool
from .timing import Predictors


def queue_s(predictors: Predictors, member: MemberState, now_s: float) -> float:
    """Seconds until the member has computed what was placed on it. From its tokens where it tells no time."""
    if member.busy_until_s is not None:
        return max(member.busy_until_s - now_s, 0.0)
    return predictors.prefill.predict(member.num_outstanding_tokens, 0) if member.num_outstanding_tokens else 0.0


def queue_times(predictors: Predictors, pool: Pool, now_s: float) -> Floats:
    """queue_s of each worker, [workers]."""
    found = np.maximum(pool.busy_until_s - now_s, 0.0)
    for row in np.flatnonzero(np.isnan(found)).tolist():
        found[row] = queue_s(predictors, pool[row], now_s)
    return found


def step_with(predictors: Predictors, member: MemberState, num_tokens: int) -> float:
    """Seconds of the decode member's step as it runs now, with one sequence of num_tokens more."""
    return predictors.step.predict(member.num_running + 1, member.num_running_tokens + num_tokens)


def least_step(predictors: Predictors, pool: Pool) -> MemberState:
    """Whose predicted step is the shortest, what is promised to it included; the first of equals."""
    return pool[int(predictors.step.predict_all(pool.num_requests, pool.num_outstanding_tokens).argmin())]
