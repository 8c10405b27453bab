"""The proxy's core: admits a request, flies it over a pair of workers, knows every request that is under way.

open ─► draining? room? a pair? ─► Flight ─► TokenStream        drain ─► admits no more, waits for the last
             └─ no: Draining | Overloaded | NoWorker
"""

from __future__ import annotations

import asyncio
import random
import time
import weakref

from ..protocol.config import ProxyConfig
from ..protocol.errors import Draining, HalfmoonError, InvalidRequest
from ..protocol.schema import KVSchema
from .admission_queue import AdmissionQueue
from .cluster import Cluster
from .conductor import Conductor
from .dispatcher import Dispatcher
from .flight import Flight, FlightDeck
from .metrics import ProxyMetrics
from .policies import create_policy
from .prefix_index import PrefixIndex
from .prefix_watch import PrefixWatch
from .request import ProxyRequest, RequestState
from .token_stream import TokenStream


class Router:
    def __init__(self, config: ProxyConfig, cluster: Cluster, metrics: ProxyMetrics, *, eos_token_ids: frozenset[int]) -> None:
        """eos_token_ids: the model's; a replay must not go on behind one. Made before the first member joins the cluster."""
        self.cluster = cluster
        self.metrics = metrics
        self.draining = False
        self.streams: weakref.WeakValueDictionary[str, TokenStream] = weakref.WeakValueDictionary()  # by request id, under way
        self._queue = AdmissionQueue(config.max_queued_requests, config.max_queued_tokens)
        self._flights: dict[str, Flight] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        index = PrefixIndex()
        self._watch = PrefixWatch(cluster, index)
        # any seed will do here: tests and the simulator give policies theirs
        conductor = Conductor(create_policy(config.policy, random.Random()), local_prefill=config.local_prefill)
        self._conductor = conductor
        self._dispatcher = Dispatcher(cluster, index, conductor, metrics)
        self._deck = FlightDeck(
            self._dispatcher, metrics, config.max_attempts, eos_token_ids, on_first_token=self._first_token, on_end=self._flight_ended
        )

    @property
    def schema(self) -> KVSchema | None:
        """None before the first worker joined."""
        return self.cluster.schema

    @property
    def max_model_len(self) -> int:
        """0 before the first worker joined."""
        return self.cluster.max_model_len

    @property
    def allows_local_prefill(self) -> bool:
        """A cluster without prefill workers serves, too."""
        return self._conductor.local_prefill != "never"

    @property
    def num_queued(self) -> int:
        """Requests without a first token."""
        return self._queue.num_requests

    @property
    def num_running(self) -> int:
        return len(self._flights) - self._queue.num_requests

    def open(self, request: ProxyRequest) -> TokenStream:
        """Starts the request. Called in the event loop.

        Raises Draining, Overloaded (with retry_after_s), NoWorker, PromptTooLong, or InvalidRequest for a request id that
        is under way: nothing was started then.
        """
        try:
            flight = self._admit(request)
        except HalfmoonError as error:
            self.metrics.entered(RequestState.REJECTED)
            self.metrics.ended(RequestState.REJECTED, error.code)
            raise
        stream = self.streams[request.request_id] = TokenStream(flight)
        return stream

    def cancel(self, request_id: str, reason: str) -> bool:
        """Whether such a request was under way."""
        flight = self._flights.get(request_id)
        if flight is not None:
            flight.cancel(reason)
        return flight is not None

    async def drain(self, timeout_s: float) -> int:
        """Admits no more, and returns when no request is left. Those that need longer are ended; returns how many."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            pass  # the answer says how many
        late = list(self._flights.values())
        for flight in late:
            flight.give_up(
                Draining(f"the cluster is shutting down and its drain of {timeout_s:g} s is over; ask again, elsewhere or later")
            )
        return len(late)

    async def close(self) -> None:
        """Cancels what is under way and leaves the stores. The cluster is its maker's to close."""
        self.draining = True
        for flight in list(self._flights.values()):
            flight.cancel("the proxy is shutting down")
        await self._watch.close()

    def _admit(self, request: ProxyRequest) -> Flight:
        num_tokens = len(request.token_ids)
        if self.draining:
            raise Draining("the proxy is draining: it finishes what it has and admits no more; ask another")
        if request.request_id in self._flights:
            raise InvalidRequest(f"request id {request.request_id!r} is under way already; choose another", param="request_id")
        self._queue.require_room(num_tokens)
        pair = self._dispatcher.place(request.token_ids)
        remaining_s = request.timeout_s - (time.monotonic() - request.arrival)
        flight = self._flights[request.request_id] = Flight(request, pair, remaining_s, self._deck)
        self._empty.clear()
        self._queue.enter(num_tokens)
        self.metrics.admitted(num_tokens)
        self._count()
        return flight

    def _first_token(self, flight: Flight) -> None:
        self._queue.leave(len(flight.request.token_ids), first_token=True)
        self._count()

    def _flight_ended(self, flight: Flight) -> None:
        if flight.is_waiting:
            self._queue.leave(len(flight.request.token_ids), first_token=False)
        del self._flights[flight.request.request_id]
        self.streams.pop(flight.request.request_id, None)
        if not self._flights:
            self._empty.set()
        self._count()

    def _count(self) -> None:
        self.metrics.set_requests(self.num_queued, self.num_running)
