"""Predictions about one member of the cluster as a snapshot shows it."""

from __future__ import annotations

from ..placement import MemberState
from .timing import Predictors


def queue_s(predictors: Predictors, member: MemberState, now_s: float) -> float:
    """Until the member has computed what was placed on it. From its tokens where it tells no time."""
    if member.busy_until_s is not None:
        return max(member.busy_until_s - now_s, 0.0)
    return predictors.prefill.predict(member.num_outstanding_tokens, 0) if member.num_outstanding_tokens else 0.0


def step_with(predictors: Predictors, member: MemberState, num_tokens: int) -> float:
    """Seconds of the decode member's step as it runs now, with one sequence of num_tokens more."""
    return predictors.step.predict(member.num_running + 1, member.num_running_tokens + num_tokens)
