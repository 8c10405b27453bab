"""What the proxy measures: Prometheus metrics, and a window of recent latencies for Status.

Every number is observed once, where the flight's PhaseClock takes it; the same number stands in the request's PhaseRecord.
"""

from __future__ import annotations

import math
from collections import Counter, deque

from prometheus_client import CollectorRegistry

from ..protocol import metrics as specs
from ..protocol.exporter import counter, gauge, histogram
from ..protocol.v1 import common_pb2, control_pb2
from .request import RequestState

WINDOW_LEN = 2048  # requests
PHASES = ("queue", "prefill_queue", "prefix_load", "prefill", "push", "handoff_wait", "first_decode", "decode")


class LatencyWindow:
    """The last WINDOW_LEN values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW_LEN)

    def add(self, value_s: float) -> None:
        self._values.append(value_s)

    def percentiles(self) -> control_pb2.StatusReply.Percentiles:
        """By nearest rank; zeros while empty."""
        ordered = sorted(self._values)
        if not ordered:
            return control_pb2.StatusReply.Percentiles()
        p50, p90, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99))
        return control_pb2.StatusReply.Percentiles(p50=p50, p90=p90, p99=p99, count=len(ordered))


class ProxyMetrics:
    """Label values are states, roles, policies, phases and error codes, never a client's words."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.ttft_window = LatencyWindow()
        self.tpot_window = LatencyWindow()
        self.outcomes: Counter[str] = Counter()  # RequestState -> requests ended in it
        self._ttft = histogram(specs.TIME_TO_FIRST_TOKEN, registry)
        self._prefill_done = histogram(specs.TIME_TO_PREFILL_DONE, registry)
        self._tpot = histogram(specs.TIME_PER_OUTPUT_TOKEN, registry)
        self._itl = histogram(specs.INTER_TOKEN_LATENCY, registry)
        self._e2e = histogram(specs.E2E_REQUEST_LATENCY, registry)
        phase = histogram(specs.REQUEST_PHASE, registry)
        self._phases = {name: phase.labels(name) for name in PHASES}
        self._requests = counter(specs.REQUESTS, registry)
        states = counter(specs.REQUEST_STATE, registry)
        self._states = {state: states.labels(state.value) for state in RequestState}
        self._replays = counter(specs.REQUEST_REPLAYS, registry)
        self._prompt_tokens = counter(specs.PROMPT_TOKENS, registry)
        self._generation_tokens = counter(specs.GENERATION_TOKENS, registry)
        self._members = gauge(specs.MEMBERS, registry)
        self._placements = counter(specs.PLACEMENTS, registry)
        self._running = gauge(specs.NUM_REQUESTS_RUNNING, registry).labels("proxy")
        self._waiting = gauge(specs.NUM_REQUESTS_WAITING, registry).labels("proxy")

    def set_members(self, role: str, num_members: int) -> None:
        self._members.labels(role).set(num_members)

    def set_requests(self, num_waiting: int, num_running: int) -> None:
        self._waiting.set(num_waiting)
        self._running.set(num_running)

    def admitted(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def entered(self, state: RequestState) -> None:
        self._states[state].inc()

    def placed(self, policy: str) -> None:
        self._placements.labels(policy).inc()

    def replayed(self, reason: str) -> None:
        self._replays.labels(reason).inc()

    def prefill_done(self, prefill_done_s: float) -> None:
        self._prefill_done.observe(prefill_done_s)

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)
        self.ttft_window.add(ttft_s)

    def tokens_sent(self, num_tokens: int, gap_s: float | None) -> None:
        """gap_s: since the tokens before, shared evenly among these; None for a request's first."""
        self._generation_tokens.inc(num_tokens)
        if gap_s is not None:
            for _ in range(num_tokens):
                self._itl.observe(gap_s / num_tokens)

    def finished(self, record: common_pb2.PhaseRecord, num_tokens: int) -> None:
        """A request that came to its own end, with its record."""
        self._e2e.observe(record.e2e_s)
        for name, child in self._phases.items():
            child.observe(getattr(record, f"{name}_s"))
        if num_tokens > 1:
            self._tpot.observe(record.tpot_s)
            self.tpot_window.add(record.tpot_s)

    def ended(self, outcome: RequestState, reason: str) -> None:
        """reason: a finish reason or an error code."""
        self.outcomes[outcome.value] += 1
        self._requests.labels(outcome.value, reason).inc()
