"""Predictions about the workers that a snapshot shows: one of them, or a whole pool at once."""

from __future__ import annotations

import numpy as np

from ....protocol.timing.chunk_sizer import LEAST_CHUNK_TOKENS
from ....protocol.timing.step_cost import StepCost
from ..member_state import MemberState
from ..pool import Floats, Ints, Pool
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


def shared_s(member: MemberState) -> float:
    """Seconds of a step's chunks of prompts behind the request."""
    num_behind = member.num_behind_tokens
    return member.behind_s * min(member.limits.max_tokens / num_behind, 1.0) if num_behind else 0.0


def wait_times(predictors: Predictors, pool: Pool, now_s: float) -> Floats:
    """queue_times, and a step under way that has chunks of those behind the request. [workers]"""
    shared = pool.behind_s * np.minimum(pool.roster.max_step_tokens / np.maximum(pool.num_behind_tokens, 1.0), 1.0)
    return queue_times(predictors, pool, now_s) + shared


def step_with(predictors: Predictors, member: MemberState, num_tokens: int) -> float:
    """Seconds of the decode member's step as it runs now, with one sequence of num_tokens more."""
    return predictors.step.predict(member.num_running + 1, member.num_running_tokens + num_tokens)


def least_step(predictors: Predictors, pool: Pool) -> MemberState:
    """Whose predicted step is the shortest, what is promised to it included; the first of equals."""
    return pool[int(predictors.step.predict_all(pool.num_requests, pool.num_outstanding_tokens).argmin())]


def slowdowns_beside(
    cost: StepCost,
    num_running: Ints | Floats,
    num_running_tokens: Ints | Floats,
    target_s: float,
    num_prefix_tokens: int,
    most: Floats | float,
) -> Floats:
    """How many times longer than alone a prompt takes in each worker's steps, by the chunks that its batch leaves room for. [workers]

    The chunk is ChunkSizer's, but for its rounding: the largest n at which the read of the weights and the products both stay under
    what the batch leaves of target_s, and not more than most.
    """
    half, each = cost.per_attention_s / 2, num_prefix_tokens * cost.per_attention_s
    rest_s = num_running * cost.per_decode_s + num_running_tokens * cost.per_context_s
    left_s = target_s - rest_s
    sizes = np.minimum(_root(half, each + cost.per_token_s, left_s - cost.chunk_s), _root(half, each, left_s - cost.read_s))
    sizes = np.minimum(np.maximum(sizes, LEAST_CHUNK_TOKENS), most)
    attention_s = sizes * (each + sizes * half)
    products_s = cost.chunk_s + sizes * cost.per_token_s
    return (np.maximum(products_s, cost.read_s) + attention_s + rest_s) / (products_s + attention_s)


def _root(square: float, linear: float, seconds: Floats) -> Floats:
    """The x at which square x² + linear x is seconds; 0 where that is below 0."""
    seconds = np.maximum(seconds, 0.0)
    below = linear + np.sqrt(linear * linear + 4.0 * square * seconds)  # of the root's other form, which takes a square of 0
    return 2.0 * seconds / np.maximum(below, 1e-12)
