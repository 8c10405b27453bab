"""From token ids to a booked pair of members: hash, look up, ask the Conductor, write it in the books.

token ids ─► block keys ─► prefix index ─► PlacementRequest ┐
             its place in the workers' queues ─► Snapshot ──┴► Conductor ─► Pair (booked on both members, on one where it is local)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from ...protocol.blocks import block_keys, root_key
from ...protocol.config import QueueOrder
from ...protocol.errors import HalfmoonError, NoWorker, Overloaded, build_error
from ...protocol.schema import KVSchema
from ..conductor.admission import Predictive
from ..conductor.conductor import Conductor
from ..conductor.forecast import handoff_bytes, handoff_link
from ..conductor.load_tracker import LoadTracker
from ..conductor.placement import NO_SLO, Placement, PlacementRequest, Rejection, Slo, Snapshot, come_back
from ..conductor.policies.base import usable_blocks
from ..conductor.predictors.waiting import step_with
from ..conductor.queue_order import queue_order
from ..members.cluster import Cluster
from ..members.member import Member
from ..metrics import ProxyMetrics
from ..prefixes.index import PrefixIndex
from ..prefixes.replicator import Replicator
from ..request import ProxyRequest
from .decisions import RequestDecision
from .learner import Learner
from .pair import Pair

PROBE_S = 30.0  # between two requests that are let in against the prediction


class Dispatcher:
    """slo: of requests that bring none. order: of the workers' queues. profiled: the predictors begin with a profile, not with a guess."""

    def __init__(
        self,
        cluster: Cluster,
        index: PrefixIndex,
        conductor: Conductor,
        learner: Learner,
        metrics: ProxyMetrics,
        replicator: Replicator,
        *,
        slo: Slo = NO_SLO,
        order: QueueOrder = "fair",
        profiled: bool = False,
    ) -> None:
        self._cluster = cluster
        self._index = index
        self._conductor = conductor
        self._learner = learner
        self._metrics = metrics
        self._replicator = replicator
        self._slo = slo
        self._order: QueueOrder = order
        self._epoch = time.monotonic()  # urgencies count from here: they are compared among requests of this process only
        self._rooted: KVSchema | None = None  # whose root key is
        self._root = b""
        self._profiled = profiled
        self._next_probe_s = self._epoch + PROBE_S
        self.load_tracker = LoadTracker()

    def slo(self, request: ProxyRequest) -> Slo:
        """Its own, where it has one."""
        ttft_s, tpot_s = request.ttft_slo_s, request.tpot_slo_s
        return Slo(self._slo.ttft_s if ttft_s is None else ttft_s, self._slo.tpot_s if tpot_s is None else tpot_s)

    def place(self, request: ProxyRequest, decision: RequestDecision) -> Pair:
        """Raises NoWorker, PromptTooLong, Overloaded."""
        slo, now_s = decision.slo, time.monotonic()
        keys = self._keys(request.token_ids)
        asked = PlacementRequest(
            len(request.token_ids),
            self._index.leading_runs(keys),
            slo=slo,
            priority=request.priority,
            waited_s=now_s - request.arrival,
        )
        place = self._place_in_queue(request, slo, None)
        seen, answer = self._ask(asked, place, now_s)
        if isinstance(answer, Rejection) and answer.code == "overloaded" and self._may_probe(now_s):
            asked = dataclasses.replace(asked, admitted=True)
            seen, answer = self._ask(asked, place, now_s)
        if (
            self._order == "late"
            and isinstance(answer, Placement)
            and answer.ttft_s is not None
            and answer.ttft_s + asked.waited_s > slo.ttft_s
        ):
            # too late even so: it gives way, and what it then waits for is another prediction
            place = self._place_in_queue(request, slo, answer.ttft_s + asked.waited_s)
            seen, answer = self._ask(asked, place, now_s)
        return self._take(request, decision, asked, seen, answer, place, keys)

    def replace(self, request: ProxyRequest, sent: Sequence[int], failed: Pair, exclude: frozenset[str], avoid: frozenset[str]) -> Pair:
        """For a request whose pair failed it, with the tokens sent so far. It keeps its place in the queues, and no SLO keeps it out.

        exclude, avoid: incarnations. Raises NoWorker, PromptTooLong.
        """
        token_ids, now_s = [*request.token_ids, *sent], time.monotonic()
        keys = self._keys(token_ids)
        held = self._index.leading_runs(keys)
        asked = PlacementRequest(len(token_ids), held, exclude, avoid, NO_SLO, request.priority, now_s - request.arrival, admitted=True)
        seen, answer = self._ask(asked, failed.queue_order, now_s)
        return self._take(request, failed.decision, asked, seen, answer, failed.queue_order, keys)

    def judge_again(self, request: ProxyRequest, pair: Pair) -> Overloaded | None:
        """When the prefill is done: whether the decode worker's step, as it is now, has room for the request within its SLO.

        None also where the admission does not ask again, as of replays.
        """
        admission = self._conductor.admission
        if admission is None or not admission.checks_again or pair.admitted or pair.is_local:
            return None
        state, limit_s, step = pair.decode.state, self.slo(request).tpot_s, self._learner.predictors.step
        step_s = step_with(self._learner.predictors, state, pair.num_tokens)
        if step_s <= limit_s:
            return None
        retry_after_s = self.load_tracker.fits_in_s(step, state, step_s, limit_s, time.monotonic())
        self._metrics.rejected(admission.name, "overloaded")
        return Overloaded(
            f"its prefill is done, and {state.id} would now step in {step_s * 1e3:.0f} ms with it, the SLO is {limit_s * 1e3:g} ms; "
            f"its blocks stay cached: {come_back(retry_after_s)}",
            retry_after_s=retry_after_s,
        )

    def finished(self, pair: Pair) -> None:
        """Its request came to its own end."""
        seconds = self.load_tracker.finished(pair, time.monotonic())
        if seconds is not None and isinstance(self._conductor.admission, Predictive):
            self._conductor.admission.observe_decode(seconds, pair.num_tokens)

    def _keys(self, token_ids: Sequence[int]) -> list[bytes]:
        schema = self._cluster.schema
        if schema is None:
            raise NoWorker("no worker has joined the cluster yet; wait for the workers to load their model")
        if schema is not self._rooted:
            self._rooted, self._root = schema, root_key(schema.fingerprint)
        return block_keys(self._root, token_ids, schema.block_size)

    def _may_probe(self, now_s: float) -> bool:
        """Whether to let a request in that is predicted to miss its SLO: refused by a wrong prediction, nobody would ever put it right.

        Only where it harms nobody, for nothing else is under way: while all predictions are a guess, and then once every PROBE_S.
        """
        if not self.load_tracker.is_idle or (now_s < self._next_probe_s and (self._profiled or self._learner.knows)):
            return False
        self._next_probe_s = now_s + PROBE_S
        return True

    def _place_in_queue(self, request: ProxyRequest, slo: Slo, predicted_ttft_s: float | None) -> int:
        if self._order == "fair":
            return request.priority
        return queue_order(
            self._order,
            arrival_s=request.arrival - self._epoch,
            ttft_slo_s=slo.ttft_s,
            predicted_ttft_s=predicted_ttft_s,
            priority=request.priority,
        )

    def _ask(self, asked: PlacementRequest, place: int, now_s: float) -> tuple[Snapshot, Placement | Rejection]:
        schema, predictors = self._cluster.schema, self._learner.predictors
        assert schema is not None  # the keys were made by it
        block_size, prefill, held = schema.block_size, predictors.prefill, asked.held_blocks

        works: dict[int, float] = {}  # blocks held -> seconds of the request behind them

        def busy_until(member: Member) -> float:
            num_held = held.get(member.store_address, 0)
            work_s = works.get(num_held)
            if work_s is None:
                cached = usable_blocks(asked, num_held, block_size) * block_size
                work_s = works[num_held] = prefill.predict(asked.num_tokens - cached, cached)
            return now_s + member.backlog.ahead_s(place, work_s, now_s)

        seen = self._cluster.snapshot(block_size, now_s, busy_until)
        if isinstance(self._conductor.admission, Predictive):
            seen = dataclasses.replace(seen, arriving=self.load_tracker.arriving, leaving=self.load_tracker.leaving)
        return seen, self._conductor.place(asked, seen)

    def _take(
        self,
        request: ProxyRequest,
        decision: RequestDecision,
        asked: PlacementRequest,
        seen: Snapshot,
        answer: Placement | Rejection,
        place: int,
        keys: list[bytes],
    ) -> Pair:
        decision.decided(asked, seen, self._learner.frozen(), answer, place)
        if isinstance(answer, Rejection):
            raise self._refused(answer)
        self._metrics.placed(self._conductor.policy.name, _kind(answer, asked))
        return self._assign(decision, answer, asked, seen, place, keys)

    def _refused(self, answer: Rejection) -> HalfmoonError:
        admission = self._conductor.admission
        if answer.code != "overloaded" or admission is None:
            self._metrics.rejected("conductor", answer.code)
            return build_error(answer.code, answer.reason)
        self._metrics.rejected(admission.name, answer.code)
        return Overloaded(answer.reason, retry_after_s=answer.retry_after_s)

    def _assign(
        self, decision: RequestDecision, placement: Placement, asked: PlacementRequest, seen: Snapshot, place: int, keys: list[bytes]
    ) -> Pair:
        predictors = self._learner.predictors
        prefill = self._cluster.members[placement.prefill.id]
        decode = self._cluster.members[placement.decode.id]
        store = self._cluster.store_at(decode.info.store_address)
        assert store is not None  # else the snapshot had not offered the worker
        num_new = asked.num_tokens - placement.num_cached_tokens
        prefill_s = predictors.prefill.predict(num_new, placement.num_cached_tokens)
        pair = Pair(
            prefill=prefill,
            decode=decode,
            store=store,
            placement=placement,
            prefill_task=prefill.backlog.place(num_new, prefill_s, place, seen.now_s),
            decode_assignment=decode.assigned.place(asked.num_tokens),
            load_tracker=self.load_tracker,
            decision=decision,
            num_tokens=asked.num_tokens,
            admitted=asked.admitted,
            queue_order=place,
            index=self._index,
            block_keys=keys,
            num_loads=prefill.num_loads,
            handoff_bytes=handoff_bytes(predictors, asked, placement.decode, seen.block_size),
            handoff_link=handoff_link(placement.prefill, placement.decode),
        )
        for address in pair.stores:
            self._index.expect(address, keys)
        self._replicator.placed(placement, keys)
        prefill.num_loads += pair.loads
        self.load_tracker.placed(pair, seen.now_s + (placement.ttft_s or 0.0), asked.num_tokens)
        return pair


def _kind(placement: Placement, asked: PlacementRequest) -> str:
    if placement.is_local:
        return "local"
    if placement.prefix is not None:
        return "remote_prefix"
    return "own_prefix" if placement.num_cached_tokens else "no_prefix"
