"""Assigns a placement to its members, so that the next placement sees it: on both members, in the prefix index, on the load tracker.

Placement ─► prefill's backlog, decode's tokens, promised blocks, copies of hot prefixes ─► Pair, which undoes it
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from ..conductor.load_tracker import LoadTracker
from ..conductor.placement import Placement
from ..conductor.policies.base import page_blocks
from ..members.cluster import Cluster
from ..members.member import Member
from ..prefixes.index import PrefixIndex
from ..prefixes.promoter import Promoter
from ..prefixes.replicator import Replicator
from .decisions import AttemptDecision
from .pair import Pair
from .prompt import Prompt


class Assigner:
    def __init__(
        self,
        cluster: Cluster,
        index: PrefixIndex,
        page_index: PrefixIndex,
        load_tracker: LoadTracker,
        replicator: Replicator,
        promoter: Promoter,
    ) -> None:
        """index, page_index: as Placer's."""
        self._cluster = cluster
        self._index = index
        self._page_index = page_index
        self._load_tracker = load_tracker
        self._replicator = replicator
        self._promoter = promoter

    def assign(self, placement: Placement, decided: AttemptDecision, prompt: Prompt) -> Pair:
        """If it raises, nothing stays assigned."""
        prefill, decode = self._cluster.members[placement.prefill.id], self._cluster.members[placement.decode.id]
        store, tracker = self._handoff_store(placement, decided.asked.num_tokens), self._load_tracker
        assignment = decode.context.place(decided.asked.num_tokens)
        pair = Pair(prefill, decode, store, placement, decided, prompt, assignment, prefill.num_loads)
        with ExitStack() as undo:
            undo.callback(pair.release)
            pair.until_released.callback(assignment.end)
            pair.once_decoding.callback(assignment.begin)
            self._assign_prefill(pair)
            self._promise_blocks(pair)
            tracker.placed(pair, decided.seen.now_s + (placement.ttft_s or 0.0), pair.num_tokens)
            pair.until_released.callback(tracker.left, pair)
            pair.once_decoding.callback(lambda: tracker.began(pair, time.monotonic()))
            self._replicator.placed(prompt.keys)
            self._promoter.placed(decided.asked, placement, prompt.keys)
            undo.pop_all()
        return pair

    def _handoff_store(self, placement: Placement, num_tokens: int) -> Member | None:
        """On the decode worker's node if it takes the hand-off, else on the prefill worker's, else anywhere. None for a local prefill."""
        if placement.is_local:
            return None
        store = self._cluster.store_for(num_tokens, [placement.decode.store_address, placement.prefill.store_address])
        assert store is not None  # the Conductor places no hand-off that no live store takes
        return store

    def _assign_prefill(self, pair: Pair) -> None:
        decided, num_cached = pair.decided, pair.placement.num_cached_tokens
        block_size = decided.seen.block_size
        num_new = pair.num_tokens - num_cached
        seconds = decided.predictors.prefill.predict(num_new, num_cached)
        task = pair.prefill.backlog.place(num_new, seconds, decided.asked.place, decided.seen.now_s)
        pair.until_prefilled.callback(lambda: task.end(time.monotonic()))
        if num_cached > page_blocks(decided.asked, pair.placement.prefill, block_size) * block_size:  # else nothing is to be loaded
            pair.prefill.num_loads += 1
            pair.until_prefilled.callback(_end_load, pair.prefill)

    def _promise_blocks(self, pair: Pair) -> None:
        """In the store that they are pushed to, and in the prefill worker's own; and in the pages of both workers."""
        prefill, decode, keys = pair.placement.prefill, pair.placement.decode, pair.prompt.keys
        addresses = {prefill.store_address, pair.store.address if pair.store is not None else ""} - {""}
        holders = [(self._index, address) for address in addresses]
        holders += [(self._page_index, worker_id) for worker_id in {prefill.id, decode.id}]
        for index, holder in holders:
            index.expect(holder, keys)
            # kept once decode has begun: the blocks are there, and the holder itself reports any that are not
            pair.until_decoding.callback(index.withdraw, holder, keys)


def _end_load(member: Member) -> None:
    member.num_loads -= 1
