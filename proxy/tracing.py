"""A finished request's spans, made of its phase record: one of the request, and one of each phase under it.

traceparent of the client ─► request span ─► queue · prefill_queue · prefix_load · prefill · handoff · write · decode
Where tracing is off there is no tracer, and nothing of this is imported. No prompt and no answer is in a span.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from ..protocol.errors import ConfigError
from ..protocol.trace_context import TraceContext
from ..protocol.v1 import common_pb2
from .request import ProxyRequest

PROVIDER = "halfmoon"
CLOSE_TIMEOUT_MS = 2000


class Ended(NamedTuple):
    """How a request ended."""

    record: common_pb2.PhaseRecord
    num_completion_tokens: int
    num_cached_tokens: int
    reason: str  # finish reason, or "" where it failed
    error_code: str  # "" where it did not


class Phase(NamedTuple):
    name: str
    began_s: float  # from the arrival
    ended_s: float
    worker: str  # that it ran on; "": the proxy


class Tracer(Protocol):
    def ended(self, request: ProxyRequest, ended: Ended) -> None:
        """On the event loop: exporting is another thread's work."""
        ...

    def close(self) -> None: ...


def phases(record: common_pb2.PhaseRecord) -> Iterator[Phase]:
    """In the order of the flow, each behind the one before. What no phase names lies between prefill and write: the hand-off."""
    at_s = 0.0
    for name, length_s, worker in (
        ("queue", record.queue_s, ""),
        ("prefill_queue", record.prefill_queue_s, record.prefill_worker),
        ("prefix_load", record.prefix_load_s, record.prefill_worker),
        ("prefill", record.prefill_s, record.prefill_worker),
    ):
        if length_s > 0.0:
            yield Phase(name, at_s, at_s + length_s, worker)
        at_s += length_s
    if record.ttft_s > 0.0:
        written_s = record.ttft_s - record.write_s
        if written_s > at_s:
            yield Phase("handoff", at_s, written_s, record.decode_worker)
        yield Phase("write", written_s, record.ttft_s, "")
    if record.e2e_s > record.ttft_s > 0.0:
        yield Phase("decode", record.ttft_s, record.e2e_s, record.decode_worker)


class OtelTracer:
    """By OpenTelemetry's SDK; processor: where spans go. Raises ConfigError where the SDK is not installed."""

    def __init__(self, model_name: str, processor: Any) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError as error:
            raise _missing() from error
        self._trace = trace
        self._model_name = model_name
        self._provider = TracerProvider(resource=Resource.create({"service.name": "halfmoon-proxy"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("halfmoon")

    def ended(self, request: ProxyRequest, ended: Ended) -> None:
        context = request.trace
        if context is None or not context.sampled:
            return
        trace = self._trace
        parent = trace.SpanContext(int(context.trace_id, 16), int(context.span_id, 16), True, trace.TraceFlags(trace.TraceFlags.SAMPLED))
        under = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        elapsed_s = time.monotonic() - request.arrival
        arrival_ns = time.time_ns() - int(elapsed_s * 1e9)
        span = self._tracer.start_span(
            f"{request.operation} {self._model_name}",
            under,
            kind=trace.SpanKind.SERVER,
            attributes=self._attributes(request, ended),
            start_time=arrival_ns,
        )
        if ended.error_code:
            span.set_status(trace.StatusCode.ERROR, ended.error_code)
        inside = trace.set_span_in_context(span)
        for phase in phases(ended.record):
            attributes = {"halfmoon.worker": phase.worker} if phase.worker else {}
            part = self._tracer.start_span(phase.name, inside, attributes=attributes, start_time=arrival_ns + int(phase.began_s * 1e9))
            part.end(arrival_ns + int(phase.ended_s * 1e9))
        span.end(arrival_ns + int((ended.record.e2e_s or elapsed_s) * 1e9))

    def close(self) -> None:
        self._provider.force_flush(CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _attributes(self, request: ProxyRequest, ended: Ended) -> dict[str, Any]:
        record = ended.record
        found: dict[str, Any] = {
            "gen_ai.operation.name": request.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": request.sampling.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.usage.input_tokens": len(request.token_ids),
            "gen_ai.usage.output_tokens": ended.num_completion_tokens,
            "halfmoon.cached_tokens": ended.num_cached_tokens,
            "halfmoon.num_attempts": record.num_attempts,
            "halfmoon.transport": record.transport,
            "halfmoon.prefill_worker": record.prefill_worker,
            "halfmoon.decode_worker": record.decode_worker,
            "halfmoon.time_to_first_token": record.ttft_s,
            "halfmoon.time_per_output_token": record.tpot_s,
        }
        if ended.reason:
            found["gen_ai.response.finish_reasons"] = [ended.reason]
        if ended.error_code:
            found["error.type"] = ended.error_code
        return found


def otlp_tracer(model_name: str) -> OtelTracer:
    """Spans go to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, in batches. Raises ConfigError."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing() from error
    return OtelTracer(model_name, BatchSpanProcessor(OTLPSpanExporter()))


def trace_of(context: TraceContext | None, tracer: Tracer | None) -> TraceContext | None:
    """The client's, or where spans are made one that begins here."""
    return context if context is not None or tracer is None else TraceContext.new()


def _missing() -> ConfigError:
    return ConfigError("proxy.tracing needs OpenTelemetry: pip install 'halfmoon[tracing]'", key="proxy.tracing")
