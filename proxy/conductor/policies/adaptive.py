"""adaptive: predicted seconds decide where a request is prefilled, where it decodes, and how many workers prefill for the others.

prefill   the worker with the least predicted first token, as in kvcache_centric. Workers that decode count, too, slowed by the batch that
          shares their steps, while those have slack; a prompt there is chunked so that no step passes its target.
decode    where the prompt was computed, if that worker decodes; else the least predicted step, chosen when the prefill begins.
roles     deliberate(): what_if.py says what share of the last requests would have been in SLO for each number of prefill workers, none
          included, and the best number is taken. A worker that changes keeps what it has, its cache included.
It is told the SLO and nothing of the load.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple, Self

import numpy as np

from ....protocol.timing.chunk_sizer import token_target_s
from ..member_state import DECODES_ITS_OWN, MemberState
from ..placement import NO_SLO, PlacementRequest, PrefixHint, Selection, Slo, Snapshot
from ..pool import Bools, Floats, Pool
from ..predictors.timing import Predictors
from ..predictors.waiting import least_step, queue_s, slowdowns_beside, step_with, wait_times
from ..what_if import Arrival, Demand, WhatIf
from .base import NOBODY, Policy, PolicySettings, RoleCause, RoleChange, best_prefix, cost_by_blocks, known_blocks, own_blocks
from .prefix_cost import fetch_pays, fetch_s, ssd_times

DEFAULT_TPOT_S = 0.05  # where the SLO bounds none: what workers then size their steps for
DEFAULT_TTFT_S = 2.0
NUM_ARRIVALS = 160  # that are looked back at
OLDEST_S = 60.0
FEWEST = 12  # arrivals that say something
END_WEIGHT = 0.03  # of the newest answer in their mean length
MOST_FORMS = 32  # that are compared, beside those next to the present one


class Seen(NamedTuple):
    """A request that was placed."""

    at_s: float
    num_new_tokens: int
    num_prefix_tokens: int


class Wanted(NamedTuple):
    """A number of workers that prefill for the others."""

    num_prefill: int
    cause: RoleCause = "slo"
    reason: str = ""


@dataclass(slots=True)
class Adaptive(Policy):
    """
    Args:
        slack_share: of a step that has to be free where a worker that decodes computes prompts, too, while others prefill.
        gain: in the share of requests in SLO, for which roles change.
        calm_s: from a change of roles to the next.
        local_prefill: workers that decode compute prompts, too.
    """

    predictors: Predictors
    slo: Slo = NO_SLO
    slack_share: float = 0.2
    full_share: float = 0.90  # of the pages
    gain: float = 0.02
    calm_s: float = 4.0
    nearly: float = 1.1
    nearly_s: float = 0.02
    local_prefill: bool = True
    last_change_s: float = -math.inf
    arrivals: deque[Seen] = field(default_factory=lambda: deque[Seen](maxlen=NUM_ARRIVALS))
    answer_len: float = 0.0  # mean of those that ended of late; 0: none has
    name: ClassVar[str] = "adaptive"
    fetches: ClassVar[bool] = True
    weighs_local: ClassVar[bool] = True
    plans_roles: ClassVar[bool] = True

    @classmethod
    def create(cls, settings: PolicySettings) -> Self:
        return cls(settings.predictors, settings.slo, local_prefill=settings.local_prefill)

    @property
    def roles(self) -> Adaptive:
        return self

    @property
    def tpot_s(self) -> float:
        return self.slo.tpot_s if math.isfinite(self.slo.tpot_s) else DEFAULT_TPOT_S

    def select(self, request: PlacementRequest, candidates: Snapshot) -> Selection:
        pool, block_size = candidates.prefill, candidates.block_size
        holder, best = best_prefix(request, block_size)
        own_of = own_blocks(request, pool, block_size)
        slowdowns, blocked = self._slowdowns(pool, request.num_tokens // 2)
        pays = partial(fetch_pays, self.predictors, request, holder, best=best, block_size=block_size)
        used_of = cost_by_blocks(own_of.held, lambda own: best if pays(own) else own).astype(np.int64)
        loads = own_of.costs(lambda own, in_pages: self._load_s(request, own, in_pages, holder, best if pays(own) else own, block_size))
        loads += ssd_times(self.predictors, request, pool, own_of, block_size)
        num_cached_of = used_of * block_size
        there = cost_by_blocks(num_cached_of, lambda cached: self.predictors.prefill.predict(request.num_tokens - cached, cached))
        here = cost_by_blocks(num_cached_of, lambda cached: self.predictors.step.cost.alone_s(request.num_tokens - cached, cached))
        ttfts = wait_times(self.predictors, pool, candidates.now_s) + loads
        ttfts += np.where(pool.roster.decodes_its_own, here, there) * slowdowns
        ttfts[blocked] = math.inf
        row = self._least(pool, ttfts)
        prefill, ttft_s = pool[row], float(ttfts[row])
        num_used = int(used_of[row])
        local = prefill.role in DECODES_ITS_OWN
        decode, tpot_s = (
            (prefill, step_with(self.predictors, prefill, request.num_tokens)) if local else self.select_decode(request, candidates)
        )
        prefix = PrefixHint(holder, best) if num_used > int(own_of.held[row]) else None
        where = "in its own decode batch" if local else f"for {decode.id}"
        reason = (
            f"{prefill.id} is predicted to give the first token in {ttft_s:.3f} s {where}, behind {num_used * block_size} cached tokens"
        )
        return Selection(prefill, decode, reason, prefix, ttft_s, tpot_s)

    def _least(self, pool: Pool, ttfts: Floats) -> int:
        """The least predicted first token. Of workers that decode nearly the least will do: the one with the shortest step, promises
        included. Idle queues would all else send everything to one."""
        row = int(ttfts.argmin())
        if not pool.roster.decodes_its_own[row]:
            return row
        step_s = self.predictors.step.predict_all(pool.num_requests, pool.num_outstanding_tokens)
        near = (ttfts <= ttfts[row] * self.nearly + self.nearly_s) & pool.roster.decodes_its_own
        return int(np.where(near, step_s, math.inf).argmin())

    def select_decode(self, request: PlacementRequest, candidates: Snapshot) -> tuple[MemberState, float]:
        """The least predicted step among those who decode (anyone where nobody does), promises included; and its step as it runs now."""
        pool = candidates.decode.keep(candidates.decode.roster.decodes_its_own)
        selected = least_step(self.predictors, pool if len(pool) else candidates.decode)
        return selected, step_with(self.predictors, selected, request.num_tokens)

    def observe_arrival(self, request: PlacementRequest, snapshot: Snapshot) -> None:
        num_cached = known_blocks(request, snapshot.block_size) * snapshot.block_size
        self.arrivals.append(Seen(snapshot.now_s, request.num_tokens - num_cached, num_cached))

    def observe_end(self, num_output_tokens: int) -> None:
        if not self.answer_len:
            self.answer_len = float(num_output_tokens)
        self.answer_len += END_WEIGHT * (num_output_tokens - self.answer_len)

    def deliberate(self, snapshot: Snapshot, fixed: frozenset[str] = NOBODY) -> Generator[None, None, tuple[RoleChange, ...]]:
        now_s, members = snapshot.now_s, list(snapshot.decode)
        prefilling = [member for member in members if member.role not in DECODES_ITS_OWN]
        decoding = [member for member in members if member.role in DECODES_ITS_OWN]
        num_now, fewest = len(prefilling), self._fewest(len(members))
        whole = bool(decoding) and num_now >= fewest
        if not members or (whole and now_s - self.last_change_s < self.calm_s):
            return ()
        wanted = yield from self._wanted(members, num_now, now_s)
        more = wanted.num_prefill - num_now
        if more > 0:
            changed = sorted((one for one in decoding if one.id not in fixed), key=lambda one: (one.num_requests, one.id))[:more]
            changes = tuple(RoleChange(one.id, "prefill", wanted.cause, wanted.reason) for one in changed)
        else:
            leaving = sorted((one for one in prefilling if one.id not in fixed), key=lambda one: (self._queue_s(one, now_s), one.id))
            changes = tuple(RoleChange(one.id, "decode", wanted.cause, wanted.reason) for one in leaving[:-more] if more)
        if changes:
            self.last_change_s = now_s
        return changes

    def _queue_s(self, member: MemberState, now_s: float) -> float:
        return queue_s(self.predictors, member, now_s)

    def _fewest(self, num_members: int) -> int:
        """Workers that must prefill for the others."""
        return 0 if self.local_prefill or num_members < 2 else 1

    def _wanted(self, members: list[MemberState], num_now: int, now_s: float) -> Generator[None, None, Wanted]:
        """As many as now, unless another number is better by `gain`; none before anything is known."""
        num_members, fewest = len(members), self._fewest(len(members))
        possible = min(max(num_now, fewest), num_members - 1)
        stays = Wanted(possible, "missing_role", "somebody has to decode" if possible < num_now else "somebody has to prefill")
        while self.arrivals and now_s - self.arrivals[0].at_s > OLDEST_S:
            self.arrivals.popleft()
        if len(self.arrivals) < FEWEST:
            return stays if self.last_change_s > -math.inf else Wanted(fewest, "unknown_load", "nothing is known of the load")
        demand, form = self.demand(members, now_s), self.what_if(members)
        scores: dict[int, float] = {}
        for number in _forms(fewest, num_members, num_now):
            scores[number] = form.score(demand, number)
            yield
        best = max(scores, key=lambda number: (scores[number], -number))
        if num_now in scores and scores[best] < scores[num_now] + self.gain:
            return stays
        known = f"{scores[num_now]:.0%} with {num_now}" if num_now in scores else f"{num_now} now"
        share = f"{scores[best]:.0%} of the last {len(demand.arrivals)} requests in SLO with {best} prefill workers"
        return Wanted(best, "slo", f"{share}, {known}")

    def demand(self, members: list[MemberState], now_s: float) -> Demand:
        num_running, num_tokens = sum(one.num_running for one in members), sum(one.num_running_tokens for one in members)
        seconds = max(now_s - self.arrivals[0].at_s, 1e-3)
        context = num_tokens / num_running if num_running else 1.0
        cost = self.predictors.step.cost
        arrivals = tuple(Arrival(one.at_s, cost.alone_s(one.num_new_tokens, one.num_prefix_tokens)) for one in self.arrivals)
        return Demand(arrivals, len(self.arrivals) / seconds * self.answer_len, num_running, context)

    def what_if(self, members: list[MemberState]) -> WhatIf:
        """By the predictors as they are now: more may be learnt before it has been asked everything."""
        predictors = self.predictors.frozen()
        slo = Slo(self.slo.ttft_s if math.isfinite(self.slo.ttft_s) else DEFAULT_TTFT_S, self.tpot_s)
        capacity_len = sum(one.kv_capacity_tokens for one in members) // len(members)
        least_slack = self.slack_share if self.local_prefill else math.inf
        most_beside = min(min(one.limits.max_tokens_beside, one.limits.max_tokens) for one in members)
        return WhatIf(predictors, slo, len(members), capacity_len, predictors.handoff.predict(0.0, "net"), least_slack, most_beside)

    def _load_s(self, request: PlacementRequest, own: int, in_pages: int, holder: str, used: int, block_size: int) -> float:
        """Seconds of transfer to a worker that holds own blocks, some in its pages; it fetches those up to used from the holder."""
        own_s = self.predictors.transfer.own((own - in_pages) * block_size * self.predictors.model.kv_bytes_per_token)
        return own_s + fetch_s(self.predictors, request, holder, own, used, block_size)

    def _slowdowns(self, pool: Pool, num_prefix_tokens: int) -> tuple[Floats, Bools]:
        """Of a prefill on each worker, by the batch in its steps; and who should not have one. [workers] each.

        num_prefix_tokens: that a chunk of the prompt stands behind, on the average.
        """
        running = pool.num_running > 0
        if not running.any():
            return np.ones(len(pool)), running
        target_s = token_target_s(self.tpot_s, 0, 0.0)
        cost, most = self.predictors.step.cost, pool.roster.max_tokens_beside
        slowdowns = slowdowns_beside(cost, pool.num_running, pool.num_running_tokens, target_s, num_prefix_tokens, most)
        slowdowns = np.where(running, slowdowns, 1.0)
        decoding = pool.roster.decodes_its_own
        if decoding.all():
            return slowdowns, np.zeros(len(pool), np.bool_)
        slack_s = target_s - self.predictors.step.predict_all(pool.num_running, pool.num_running_tokens)
        capacity = pool.kv_capacity_tokens
        full = (capacity > 0) & (pool.num_outstanding_tokens > self.full_share * capacity)
        return slowdowns, running & decoding & ((slack_s < self.slack_share * target_s) | full)


def _forms(fewest: int, num_members: int, num_now: int) -> list[int]:
    """Numbers of workers that prefill alone, to be compared: all of them; of many workers some, and those next to the present one."""
    if num_members <= MOST_FORMS:
        return list(range(fewest, num_members))
    spread = np.linspace(fewest, num_members - 1, MOST_FORMS).round().astype(int).tolist()
    near = [number for number in range(num_now - 2, num_now + 3) if fewest <= number < num_members]
    return sorted({*spread, *near})
