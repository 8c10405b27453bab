"""Asks the Conductor where a request goes: describes the request and the cluster, and asks again where needed.

Prompt ─► prefix index ─► PlacementRequest ─┐
          its queue order ──────► Snapshot ──┴► Conductor ─► AttemptDecision
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ...protocol.blocks import BlockKey
from ...protocol.config import QueueOrder
from ..conductor.admission import Admission
from ..conductor.backlog import QueuePlace
from ..conductor.conductor import Conductor
from ..conductor.load_tracker import LoadTracker
from ..conductor.placement import NO_SLO, Placement, PlacementRequest, Rejection, Slo, Snapshot
from ..conductor.policies.base import usable_blocks
from ..conductor.queue_order import TICKS_PER_S, first_token_due_s, queue_order
from ..members.cluster import Asking, Cluster
from ..prefixes.index import PrefixIndex
from ..request import ProxyRequest
from .decisions import AttemptDecision, RequestDecision
from .learner import Learner
from .prompt import Prompt

PROBE_S = 30.0  # between two requests that are admitted against the prediction


class QueueOrdering:
    """Gives each request its queue_order. order: how the workers' queues are sorted."""

    def __init__(self, order: QueueOrder) -> None:
        self.order: QueueOrder = order
        self._epoch = time.monotonic()  # orders count from here: they are compared among requests of this process only

    @property
    def asks_twice(self) -> bool:
        """A request that is predicted to be late has another place."""
        return self.order == "late"

    def order_of(self, request: ProxyRequest, slo: Slo, work_s: float, predicted_ttft_s: float | None = None) -> int:
        """work_s: predicted seconds of its prefill alone; predicted_ttft_s: counted from the arrival."""
        if self.order == "fair":
            return request.priority
        return queue_order(
            self.order,
            arrival_s=request.arrival - self._epoch,
            ttft_slo_s=slo.ttft_s,
            predicted_ttft_s=predicted_ttft_s,
            work_s=work_s,
            priority=request.priority,
        )

    def due_of(self, request: ProxyRequest, slo: Slo, work_s: float) -> float:
        """When its first token is due, of time.monotonic(); inf: at no moment of its own."""
        if self.order == "fair":
            return math.inf
        return first_token_due_s(self.order, arrival_s=request.arrival, ttft_slo_s=slo.ttft_s, work_s=work_s)

    def passed_until_s(self, order: int) -> float:
        """The moment of time.monotonic() that it stands for; -inf where later arrivals pass nobody."""
        return -math.inf if self.order == "fair" else self._epoch + order / TICKS_PER_S


class Placer:
    """index, page_index: what stores hold, by address, and what stands in workers' pages, by id.
    profiled: the predictors start from a profile, not from a guess.
    """

    def __init__(
        self,
        cluster: Cluster,
        index: PrefixIndex,
        page_index: PrefixIndex,
        conductor: Conductor,
        learner: Learner,
        load_tracker: LoadTracker,
        ordering: QueueOrdering,
        *,
        profiled: bool = False,
    ) -> None:
        self.conductor = conductor
        self.learner = learner
        self.load_tracker = load_tracker
        self._cluster = cluster
        self._index = index
        self._page_index = page_index
        self._ordering = ordering
        self._profiled = profiled
        self._next_probe_s = time.monotonic() + PROBE_S

    @property
    def admission(self) -> Admission | None:
        return self.conductor.admission

    def place(self, request: ProxyRequest, prompt: Prompt, decision: RequestDecision) -> AttemptDecision:
        """The decision holds the answer: a Placement or a Rejection."""
        slo, now_s = decision.slo, time.monotonic()
        asked = self._described(request, prompt, now_s, slo=slo)
        work_s = self._work_s(asked, max((*asked.held_blocks.values(), *asked.page_blocks.values()), default=0))
        order = self._ordering.order_of(request, slo, work_s)
        decision.first_token_due = self._ordering.due_of(request, slo, work_s)
        asked = self._in_place(asked, order, decision.first_token_due)
        seen, answer = self._ask(asked, now_s)
        if isinstance(answer, Rejection) and answer.code == "overloaded" and self._may_probe(now_s):
            asked = dataclasses.replace(asked, admitted=True)
            seen, answer = self._ask(asked, now_s)
        if self._ordering.asks_twice and isinstance(answer, Placement) and answer.ttft_s is not None:
            predicted_s = answer.ttft_s + asked.waited_s
            if predicted_s > slo.ttft_s:
                # late even so: it gives way to others, and then waits longer, so it is predicted anew
                order = self._ordering.order_of(request, slo, work_s, predicted_s)
                asked = self._in_place(asked, order, decision.first_token_due)
                seen, answer = self._ask(asked, now_s)
        return self._decided(decision, asked, seen, answer)

    def place_again(
        self,
        request: ProxyRequest,
        prompt: Prompt,
        decision: RequestDecision,
        order: int,
        exclude: frozenset[str],
        avoid: frozenset[str],
    ) -> AttemptDecision:
        """It keeps its queue order, and no SLO keeps it out.

        prompt: includes the tokens sent so far. exclude, avoid: incarnations.
        """
        now_s = time.monotonic()
        asked = self._described(request, prompt, now_s, exclude=exclude, avoid=avoid, slo=NO_SLO, admitted=True)
        has_tokens = prompt.num_tokens > decision.num_tokens  # and is then due at no moment
        asked = self._in_place(asked, order, math.inf if has_tokens else decision.first_token_due)
        seen, answer = self._ask(asked, now_s)
        return self._decided(decision, asked, seen, answer)

    def _described(self, request: ProxyRequest, prompt: Prompt, now_s: float, **fields: Any) -> PlacementRequest:
        """fields: of the PlacementRequest."""
        schema = self._cluster.schema
        assert schema is not None
        keys = _usable_keys(request, prompt)
        held = self._index.leading_runs(keys)
        asked = PlacementRequest(
            prompt.num_tokens,
            held,
            priority=request.priority,
            waited_s=now_s - request.arrival,
            page_blocks=self._page_index.leading_runs(keys),
            ssd_blocks=self._index.ssd_runs(keys, held),
            **fields,
        )
        return self.conductor.weigh(asked, schema.block_size)

    def _may_probe(self, now_s: float) -> bool:
        """True if a request may be admitted although it is predicted to miss its SLO.

        A wrong prediction that refused everybody would never be corrected. A probe runs only while nothing else is under way, so
        it harms nobody: always while the predictions are still a guess, and after that once every PROBE_S.
        """
        if not self.load_tracker.is_idle or (now_s < self._next_probe_s and (self._profiled or self.learner.knows)):
            return False
        self._next_probe_s = now_s + PROBE_S
        return True

    def _decided(
        self, decision: RequestDecision, asked: PlacementRequest, seen: Snapshot, answer: Placement | Rejection
    ) -> AttemptDecision:
        """The Conductor is told of an arrival once, however often it was asked."""
        predictors = self.learner.frozen()  # what the answer was predicted by
        self.conductor.observe_arrival(asked, seen, answer)
        self.learner.arrived()
        return decision.decided(asked, seen, predictors, answer)

    def _in_place(self, asked: PlacementRequest, order: int, due_s: float) -> PlacementRequest:
        place = QueuePlace(order, due_s, asked.priority)
        return dataclasses.replace(asked, place=place, passed_until_s=self._ordering.passed_until_s(order))

    def _work_s(self, asked: PlacementRequest, num_held: int) -> float:
        """Predicted seconds of the prefill alone, behind so many held blocks."""
        schema = self._cluster.schema
        assert schema is not None  # the keys were made by it
        cached = usable_blocks(asked, num_held, schema.block_size) * schema.block_size
        return self.learner.predictors.prefill.predict(asked.num_tokens - cached, cached)

    def _ask(self, asked: PlacementRequest, now_s: float) -> tuple[Snapshot, Placement | Rejection]:
        schema = self._cluster.schema
        assert schema is not None
        asking = Asking(asked.held_blocks, asked.place, partial(self._work_s, asked), asked.page_blocks)
        seen = self._cluster.snapshot(schema.block_size, now_s, asking)
        if self.admission is not None and self.admission.wants_arrivals:
            seen = dataclasses.replace(seen, arriving=self.load_tracker.arriving, began_s=self.load_tracker.began_s)
        return seen, self.conductor.place(asked, seen)


def _usable_keys(request: ProxyRequest, prompt: Prompt) -> Sequence[BlockKey]:
    """Blocks that need not be computed where they are held; none where every token of the prompt is to be scored."""
    return prompt.keys if request.sampling.num_prompt_logprobs is None else ()
