"""From token ids to a booked pair of members: hash, look up, ask the Conductor, write it in the books.

token ids ─► block keys ─► prefix index ─► PlacementRequest ┐
                                      cluster ─► Snapshot ──┴► Conductor ─► Pair (booked on both members, on one where it is local)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.blocks import block_keys, root_key
from ..protocol.errors import NoWorker, build_error
from .cluster import Cluster
from .conductor import Conductor
from .load_book import Booking
from .member import Member
from .metrics import ProxyMetrics
from .placement import Placement, PlacementRequest, Rejection
from .prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Member
    decode: Member
    store: Member  # on the decode worker's node, where the hand-off lies
    placement: Placement
    prefill_booking: Booking | None  # ends when the prefill is done; None: local, the decode worker has the tokens in its books already
    decode_booking: Booking  # ends with the attempt

    @property
    def is_local(self) -> bool:
        """prefill is decode, and computes the prompt itself."""
        return self.placement.is_local

    def end_prefill(self) -> None:
        if self.prefill_booking is not None:
            self.prefill_booking.end()

    def release(self) -> None:
        self.end_prefill()
        self.decode_booking.end()


class Dispatcher:
    def __init__(self, cluster: Cluster, index: PrefixIndex, conductor: Conductor, metrics: ProxyMetrics) -> None:
        self._cluster = cluster
        self._index = index
        self._conductor = conductor
        self._metrics = metrics

    def place(self, token_ids: Sequence[int], exclude: frozenset[str] = frozenset(), avoid: frozenset[str] = frozenset()) -> Pair:
        """Raises NoWorker or PromptTooLong."""
        schema = self._cluster.schema
        if schema is None:
            raise NoWorker("no worker has joined the cluster yet; wait for the workers to load their model")
        snapshot = self._cluster.snapshot(schema.block_size)
        keys = block_keys(root_key(schema.fingerprint), token_ids, schema.block_size)
        request = PlacementRequest(len(token_ids), self._index.leading_runs(keys), exclude, avoid)
        answer = self._conductor.place(request, snapshot)
        if isinstance(answer, Rejection):
            raise build_error(answer.code, answer.reason)
        self._metrics.placed("local" if answer.is_local else self._conductor.policy.name)
        return self._book(answer, len(token_ids))

    def _book(self, placement: Placement, num_tokens: int) -> Pair:
        prefill = self._cluster.members[placement.prefill.id]
        decode = self._cluster.members[placement.decode.id]
        store = self._cluster.store_at(decode.info.store_address)
        assert store is not None  # else the snapshot had not offered the worker
        return Pair(
            prefill=prefill,
            decode=decode,
            store=store,
            placement=placement,
            prefill_booking=None if placement.is_local else prefill.book.place(num_tokens - placement.num_cached_tokens),
            decode_booking=decode.book.place(num_tokens),
        )
