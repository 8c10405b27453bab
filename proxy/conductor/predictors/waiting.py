"""Predictions about one member of the cluster as a snapshot shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def least_step(predictors: Predictors, members: Iterable[MemberState]) -> MemberState:
    """Whose predicted step is the shortest, what is promised to it included; the first of equals. Called for each placement, so it is
    one loop without a call: StepTime.predict, written out."""
    step = predictors.step
    base_s, per_sequence_s, per_kv_token_s = step.base_s, step.per_sequence_s, step.per_kv_token_s
    chosen, chosen_s = None, math.inf
    for member in members:
        step_s = base_s + member.num_requests * per_sequence_s + member.num_outstanding_tokens * per_kv_token_s
        if step_s < chosen_s or chosen is None:
            chosen, chosen_s = member, step_s
    assert chosen is not None, "a pool has one member at least"
    return chosen
