"""When a request's turn comes on one worker, arranged as the worker does it. What MemberState tells of its queue is made exact here.

Snapshot.waiting(worker) + the request ─► turns.before ─► MemberState: ahead of it, behind it, and whether it gives way to others
"""

from __future__ import annotations

import dataclasses
import math

from ...protocol.timing.chunk_sizer import token_target_s
from ...protocol.timing.step_cost import StepWork
from ...protocol.timing.turns import Turn, before
from .member_state import MemberState
from .placement import PlacementRequest, Snapshot
from .predictors.timing import Predictors

MOST_ARRANGED = 200  # prompts that wait on a worker; of more than that the snapshot's own estimate is kept


def with_turns(predictors: Predictors, request: PlacementRequest, member: MemberState, num_cached: int, snapshot: Snapshot) -> MemberState:
    """The member as the snapshot shows it, where it orders prompts by their places alone.

    num_cached: tokens of the request that it would not have to compute.
    """
    place, now_s = request.place, snapshot.now_s
    if snapshot.waiting is None or not math.isfinite(place.due_s):
        return member
    waiting = snapshot.waiting(member.id)
    if len(waiting) > MOST_ARRANGED:
        return member
    pace = pace_on(predictors, member, request.tpot_s(member.limits))
    work_s = predictors.prefill.predict(request.num_tokens - num_cached, num_cached)
    first = [one for one in waiting if math.isinf(one.turn.due_s)]  # those that are due come after them
    due = [one for one in waiting if math.isfinite(one.turn.due_s)]
    first_s = sum(one.turn.left_s for one in first)
    turns = [one.turn._replace(left_s=pace * one.turn.left_s) for one in due]
    turns.append(Turn((place.queue_order, 1), place.due_s, pace * work_s, place.priority))
    found = before(turns, len(due), now_s + pace * first_s)
    ahead = [*first, *(due[index] for index in found.indices)]
    ahead_s, num_ahead = sum(one.turn.left_s for one in ahead), sum(one.num_tokens for one in ahead)
    all_s, num_all = sum(one.turn.left_s for one in waiting), sum(one.num_tokens for one in waiting)
    return dataclasses.replace(
        member,
        busy_until_s=now_s + ahead_s,
        num_ahead_tokens=num_ahead,
        num_behind_tokens=max(num_all - num_ahead, 0.0),
        behind_s=max(all_s - ahead_s, 0.0),
        gives_way=not found.in_time,
    )


def pace_on(predictors: Predictors, member: MemberState, tpot_s: float) -> float:
    """How many times as long as alone a prompt takes there, as the worker itself predicts it."""
    if not member.num_running:
        return 1.0
    decodes = StepWork(num_decodes=member.num_running, num_context_tokens=member.num_running_tokens)
    return member.limits.sizer().pace(predictors.step.cost, decodes, token_target_s(tpot_s, 0, 0.0))
