"""When a prompt's last chunk is computed on one worker: by its place in the queue, and by the steps that it shares.

before it, and what will pass it ─┐
itself ───────────────────────────┴─► whole steps, and a last one that others fill up: its token comes out at that step's end
Beside a decode batch each step reads the weights and the batch's context, and its chunks are as large as the batch's TPOT allows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ....protocol.timing.chunk_sizer import token_target_s
from ....protocol.timing.step_cost import ChunkWork, StepWork, attention_of
from ..member_state import MemberState
from .timing import Predictors
from .waiting import queue_s, shared_s

NUM_ROUNDS = 4  # at most: what passes it makes it wait for more that passes it
SAME = 0.01  # a round that changes the wait by less is the last


class Prompt(NamedTuple):
    num_new_tokens: int
    num_cached_tokens: int
    lets_pass_s: float  # later arrivals, from now; -inf: nobody
    tpot_s: float  # that steps beside decodes are sized for
    due_in_s: float = math.inf  # nobody passes it who would make it later than that


class Wait(NamedTuple):
    queue_s: float  # until the prompt begins
    prefill_s: float  # from then on until its token is there, all that shares its steps included
    exposed_s: float  # of both, until its last step begins: who comes later is in no step of its


def wait_for(predictors: Predictors, prompt: Prompt, member: MemberState, num_workers: int, now_s: float) -> Wait:
    """num_workers: that arrivals are spread over."""
    ahead_s, own_s = queue_s(predictors, member, now_s), predictors.prefill.predict(prompt.num_new_tokens, prompt.num_cached_tokens)
    steps, num_own = _Steps.of(predictors, prompt, member), prompt.num_new_tokens
    found = steps.seconds(ahead_s, member.num_ahead_tokens, own_s, num_own, member.num_behind_tokens)
    room_s = max(prompt.due_in_s - found.queue_s - found.prefill_s, 0.0)
    for _ in range(NUM_ROUNDS):
        exposed_s = found.exposed_s
        if exposed_s <= 0.0:
            break
        passing = predictors.passing.within(exposed_s, prompt.lets_pass_s, now_s, num_workers)
        if passing.seconds > room_s and own_s > predictors.passing.mean_s:  # of too many the longest are left out, and let all others pass
            late = prompt._replace(lets_pass_s=math.inf, due_in_s=math.inf)
            return wait_for(predictors, late, member, num_workers, now_s)
        passing = passing.at_most(room_s)
        num_ahead, num_behind = member.num_ahead_tokens + passing.num_tokens, member.num_behind_tokens + passing.num_behind_tokens
        found = steps.seconds(ahead_s + passing.seconds, num_ahead, own_s, num_own, num_behind)
        if abs(found.exposed_s - exposed_s) <= SAME * exposed_s:
            break
    return found


class _Steps(NamedTuple):
    """Of a worker."""

    size: int  # tokens of a step's chunks
    per_token_s: float
    idle_s: float  # of a whole step, beside the products of its chunks
    rest_s: float  # the same of a step, whatever its chunks
    read_s: float
    chunk_s: float
    under_way_s: float  # of a step that a new prompt is not in: at most what is left of it

    @classmethod
    def of(cls, predictors: Predictors, prompt: Prompt, member: MemberState) -> _Steps:
        cost, most = predictors.step.cost, member.limits.max_tokens
        if not member.num_running:
            per_token_s = predictors.prefill.per_token_s
            under_way_s = 0.0 if member.num_ahead_tokens else shared_s(member)
            return cls(most, per_token_s, 0.0, 0.0, 0.0, 0.0, under_way_s)
        decodes = StepWork(num_decodes=member.num_running, num_context_tokens=member.num_running_tokens)
        num_waiting = round(member.num_ahead_tokens) + prompt.num_new_tokens
        waiting = [ChunkWork(prompt.num_cached_tokens, max(num_waiting, most))]
        size = member.limits.sizer().num_tokens(cost, decodes, token_target_s(prompt.tpot_s, 0, 0.0), waiting)
        rest_s = cost.seconds(decodes) - cost.read_s
        products_s = cost.chunk_s + size * cost.per_token_s
        idle_s = max(cost.read_s, products_s) - size * cost.per_token_s + rest_s
        num_queued = min(member.num_ahead_tokens + member.num_behind_tokens, size)
        queued = decodes._replace(num_chunk_tokens=round(num_queued), attention=attention_of(round(num_queued), 0))
        return cls(size, cost.per_token_s, idle_s, rest_s, cost.read_s, cost.chunk_s, cost.seconds(queued))

    def seconds(self, ahead_s: float, num_ahead: float, own_s: float, num_own: int, num_behind: float) -> Wait:
        """ahead_s, own_s: alone."""
        num_before = num_ahead // self.size
        num_whole = math.ceil((num_ahead + num_own) / self.size) - 1
        in_last = num_ahead + num_own - num_whole * self.size
        filled = min(in_last + num_behind, self.size)
        more_s = (filled - in_last) * self.per_token_s
        if self.rest_s or self.read_s:
            products_s = self.chunk_s + filled * self.per_token_s
            more_s = max(self.read_s, products_s) - in_last * self.per_token_s + self.rest_s
        queue_s = self.under_way_s + ahead_s + num_before * self.idle_s
        prefill_s = own_s + (num_whole - num_before) * self.idle_s + more_s
        return Wait(queue_s, prefill_s, queue_s + prefill_s - more_s - in_last * self.per_token_s)
