"""What the proxy measures: Prometheus metrics, and a window of recent latencies for Status.

Each number is observed once, where the runner's PhaseClock takes it. The request's PhaseRecord has the same number.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque

from prometheus_client import CollectorRegistry

from ..protocol import metrics as specs
from ..protocol.exporter import LightCounter, LightHistogram, counter, gauge, histogram
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import common_pb2, control_pb2
from .face_metrics import FaceMetrics
from .member_metrics import MemberMetrics
from .request import RequestState
from .timeline import Timeline
from .verdict import Verdict

WINDOW_LEN = 2048  # requests
ERROR_WEIGHT = 0.02  # of the newest relative error in the mean
PREDICTORS = ("prefill", "step", "transfer", "ssd", "handoff", "ttft", "tpot")
PHASES = ("queue", "prefill_queue", "prefix_load", "prefill", "push", "handoff_wait", "write", "first_decode", "decode")
FALLBACKS = ("local_prefill", "transport", "replay")


class LatencyWindow:
    """The last WINDOW_LEN values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW_LEN)

    def add(self, value_s: float) -> None:
        self._values.append(value_s)

    def percentiles(self) -> control_pb2.StatusReply.Percentiles:
        """By nearest rank; zeros while the window is empty."""
        ordered = sorted(self._values)
        if not ordered:
            return control_pb2.StatusReply.Percentiles()
        p50, p90, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.9, 0.99))
        return control_pb2.StatusReply.Percentiles(p50=p50, p90=p90, p99=p99, count=len(ordered))


class ProxyMetrics:
    """Label values are states, roles, policies, phases and error codes, never a client's own text."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.members = MemberMetrics(registry)
        self.faces = FaceMetrics(registry)
        self.ttft_window = LatencyWindow()
        self.tpot_window = LatencyWindow()
        self.timeline = Timeline()
        self.outcomes: Counter[str] = Counter()  # RequestState -> requests ended in it
        self._ttft = histogram(specs.TIME_TO_FIRST_TOKEN, registry)
        self._prefill_done = histogram(specs.TIME_TO_PREFILL_DONE, registry)
        self._tpot = histogram(specs.TIME_PER_OUTPUT_TOKEN, registry)
        self._itl = LightHistogram(specs.INTER_TOKEN_LATENCY, registry)
        self._e2e = histogram(specs.E2E_REQUEST_LATENCY, registry)
        phase = histogram(specs.REQUEST_PHASE, registry)
        self._phases = {name: phase.labels(name) for name in PHASES}
        self._requests = counter(specs.REQUESTS, registry)
        for labels in itertools.product(("done",), ("stop", "length"), ("default", "own", "none"), ("yes",), ("none",)):
            self._requests.labels(*labels)  # 0 is not absent: goodput of none is 0, and not missing
        states = counter(specs.REQUEST_STATE, registry)
        self._states = {state: states.labels(state.value) for state in RequestState}
        self._replays = counter(specs.REQUEST_REPLAYS, registry)
        fallbacks = counter(specs.FALLBACKS, registry)
        self._fallbacks = {reason: fallbacks.labels(reason) for reason in FALLBACKS}
        self._prompt_tokens = counter(specs.PROMPT_TOKENS, registry)
        self._cached_tokens = counter(specs.CACHED_PROMPT_TOKENS, registry)
        self._prompt_lens = histogram(specs.REQUEST_PROMPT_TOKENS, registry)
        self._answer_lens = histogram(specs.REQUEST_GENERATION_TOKENS, registry)
        self._generation_tokens = LightCounter(specs.GENERATION_TOKENS, registry)
        self._placements = counter(specs.PLACEMENTS, registry)
        self._decisions = counter(specs.DECISIONS, registry)
        self._rejections = counter(specs.REJECTIONS, registry)
        self.rejections: Counter[str] = Counter()  # who refused -> requests
        self._predicted_ttft = histogram(specs.PREDICTED_TTFT, registry)
        self._predicted_tpot = histogram(specs.PREDICTED_TPOT, registry)
        self._ttft_error = histogram(specs.PREDICTED_TTFT_ERROR, registry)
        self._tpot_error = histogram(specs.PREDICTED_TPOT_ERROR, registry)
        errors, means = histogram(specs.PREDICTION_ERROR, registry), gauge(specs.PREDICTION_ERROR_MEAN, registry)
        self._errors = {name: (errors.labels(name), means.labels(name)) for name in PREDICTORS}
        self.mean_errors: dict[str, float] = {}  # predictor -> recent mean of the relative error
        self._num_errors: Counter[str] = Counter()
        self._slo_requests = counter(specs.SLO_REQUESTS, registry)
        for labels in itertools.product(("ttft", "tpot"), ("default", "own"), ("yes", "no")):
            self._slo_requests.labels(*labels)
        self.num_in_slo = self.num_outside_slo = 0  # of finished requests with an SLO
        self._streaming = gauge(specs.REQUESTS_STREAMING, registry)
        self._waiting = gauge(specs.REQUESTS_WAITING, registry)

    def set_requests(self, num_waiting: int, num_streaming: int) -> None:
        self._waiting.set(num_waiting)
        self._streaming.set(num_streaming)

    def admitted(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)

    def entered(self, state: RequestState) -> None:
        self._states[state].inc()

    def placed(self, policy: str, kind: str) -> None:
        """kind: local, remote_prefix, own_prefix, no_prefix."""
        self._placements.labels(kind if kind == "local" else policy).inc()
        self._decisions.labels(policy, kind).inc()

    def rejected(self, admission: str, code: str) -> None:
        """admission: the admission's name, or who else refused: queue, conductor, drain."""
        self._rejections.labels(admission, code).inc()
        self.rejections[admission] += 1

    def predicted(self, predictor: str, predicted_s: float, measured_s: float) -> None:
        """One predicted number and its measured value. predictor: one of PREDICTORS."""
        error = abs(predicted_s - measured_s) / max(measured_s, 1e-9)
        self._num_errors[predictor] += 1
        mean = self.mean_errors.get(predictor, 0.0)
        mean += max(ERROR_WEIGHT, 1.0 / self._num_errors[predictor]) * (error - mean)
        self.mean_errors[predictor] = mean
        errors, means = self._errors[predictor]
        errors.observe(error)
        means.set(mean)

    def replayed(self, reason: str) -> None:
        self._replays.labels(reason).inc()
        self.fell_back("replay")

    def fell_back(self, reason: str) -> None:
        """reason: of FALLBACKS."""
        self._fallbacks[reason].inc()

    def prefill_done(self, prefill_done_s: float) -> None:
        self._prefill_done.observe(prefill_done_s)

    def first_token(self, record: common_pb2.PhaseRecord, trace: TraceContext | None = None) -> None:
        ttft_s, predicted_s = record.ttft_s, record.predicted_ttft_s
        self._ttft.observe(ttft_s, None if trace is None else {"trace_id": trace.trace_id})
        self.ttft_window.add(ttft_s)
        self.timeline.first_token(ttft_s)
        if predicted_s > 0.0:
            self._predicted_ttft.observe(predicted_s)
            self._ttft_error.observe(abs(predicted_s - ttft_s))
            self.predicted("ttft", predicted_s, ttft_s)

    def tokens_written(self, num_tokens: int, gap_s: float | None) -> None:
        """gap_s: since the tokens before, divided evenly among these. None for a request's first token."""
        self._generation_tokens.value += num_tokens
        if gap_s is not None:
            self._itl.observe(gap_s / num_tokens, num_tokens)

    def finished(self, record: common_pb2.PhaseRecord, usage: common_pb2.Usage) -> None:
        """A request has finished by itself, with this record."""
        self._e2e.observe(record.e2e_s)
        for name, child in self._phases.items():
            child.observe(getattr(record, f"{name}_s"))
        self._cached_tokens.inc(usage.num_cached_tokens)
        self._prompt_lens.observe(usage.num_prompt_tokens)
        self._answer_lens.observe(usage.num_completion_tokens)
        if usage.num_completion_tokens > 1:
            self._tpot.observe(record.tpot_s)
            self.tpot_window.add(record.tpot_s)
            self.timeline.finished(record.tpot_s)
            if record.predicted_tpot_s > 0.0 and record.tpot_s > 0.0 and record.num_attempts == 1:  # a replay's gap is no decode step
                self._predicted_tpot.observe(record.predicted_tpot_s)
                self._tpot_error.observe(abs(record.predicted_tpot_s - record.tpot_s))
                self.predicted("tpot", record.predicted_tpot_s, record.tpot_s)

    def ended(self, outcome: RequestState, reason: str, verdict: Verdict) -> None:
        """reason: a finish reason or an error code."""
        self.outcomes[outcome.value] += 1
        self.timeline.ended(verdict.in_slo)
        self._requests.labels(outcome.value, reason, verdict.slo_class, verdict.in_slo, verdict.miss).inc()
        for slo, met in (("ttft", verdict.ttft_met), ("tpot", verdict.tpot_met)):
            if met is not None:
                self._slo_requests.labels(slo, verdict.slo_class, "yes" if met else "no").inc()
        if outcome is RequestState.DONE and verdict.slo_class != "none":
            self.num_in_slo += verdict.in_slo == "yes"
            self.num_outside_slo += verdict.in_slo == "no"
