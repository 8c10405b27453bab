"""Spans as OpenTelemetry's own exporter sees them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.errors import RequestCancelled
from halfmoon.protocol.trace_context import TraceContext
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.router import Router
from halfmoon.proxy.tracing import OtelTracer, trace_of

CLIENT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


class Spans:
    def __init__(self) -> None:
        pytest.importorskip("opentelemetry.sdk", reason="the extra halfmoon[tracing] is not installed")
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer("tiny", SimpleSpanProcessor(self._exporter))

    def by_name(self) -> dict[str, Any]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def spans(bench: Any) -> Spans:
    spans = Spans()
    context = bench.router._context
    object.__setattr__(context, "tracer", spans.tracer)
    return spans


def traced(request: ProxyRequest, **more: Any) -> ProxyRequest:
    return dataclasses.replace(request, trace=CLIENT, **more)


async def test_a_requests_span_stands_under_the_clients_and_its_phases_under_it_in_order(bench: Any, peers: Any, spans: Spans) -> None:
    before_ns = time.time_ns()
    _, finished = await peers.read(bench.router.open(traced(bench.request(), operation="chat")))
    found = spans.by_name()
    root = found.pop("chat tiny")
    assert f"{root.context.trace_id:032x}" == CLIENT.trace_id and f"{root.parent.span_id:016x}" == CLIENT.span_id
    assert before_ns - 10**9 < root.start_time and root.end_time - root.start_time == pytest.approx(finished.phases.e2e_s * 1e9, abs=1e6)
    assert list(found) == ["queue", "prefill_queue", "prefix_load", "prefill", "write", "decode"]
    assert all(span.parent.span_id == root.context.span_id for span in found.values())
    assert found["prefill"].attributes["halfmoon.worker"] == "prefill-0" and found["decode"].attributes["halfmoon.worker"] == "decode-0"
    attributes = dict(root.attributes)
    assert attributes["gen_ai.operation.name"] == "chat" and attributes["gen_ai.request.model"] == "tiny"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (10, 6)
    assert tuple(attributes["gen_ai.response.finish_reasons"]) == ("length",) and "error.type" not in attributes


async def test_a_request_that_ends_otherwise_has_its_error_in_the_span(bench: Any, peers: Any, spans: Spans) -> None:
    bench.prefills[0].before_seal = peers.forever
    stream = bench.router.open(traced(bench.request()))
    await bench.prefills[0].arrived.wait()
    await stream.cancel("asked to")
    with pytest.raises(RequestCancelled):
        await anext(stream)
    root = spans.by_name()["text_completion tiny"]
    assert root.attributes["error.type"] == "request_cancelled" and not root.status.is_ok


async def test_no_token_of_prompt_or_answer_is_in_a_span(bench: Any, peers: Any, spans: Spans) -> None:
    prompt = [777_001 + number for number in range(9)]
    token_ids, _ = await peers.read(bench.router.open(traced(bench.request(prompt))))
    text = " ".join(span.to_json() for span in spans.by_name().values())
    assert not any(str(token_id) in text for token_id in prompt)
    assert not any(f'"{token_id}"' in text or f" {token_id}," in text for token_id in token_ids)


async def test_the_trace_goes_to_both_workers_and_to_the_exemplar_of_the_first_token(bench: Any, peers: Any) -> None:
    metadata: dict[str, Any] = {}
    for peer in (bench.prefills[0], bench.decodes[0]):
        member, start = bench.cluster.members[peer.id], f"start_{peer.role}"
        call = getattr(member, start)

        def spied(*arguments: Any, call: Any = call, role: str = peer.role, **more: Any) -> Any:
            metadata[role] = more["metadata"]
            return call(*arguments, **more)

        setattr(member, start, spied)
    await peers.read(bench.router.open(traced(bench.request())))
    assert metadata == {"prefill": (("traceparent", CLIENT.header),), "decode": (("traceparent", CLIENT.header),)}
    samples = [one for family in bench.registry.collect() for one in family.samples if one.name.startswith("halfmoon_time_to_first_token")]
    assert [one.exemplar.labels for one in samples if one.exemplar] == [{"trace_id": CLIENT.trace_id}]


async def test_what_the_client_does_not_sample_makes_no_span(bench: Any, peers: Any, spans: Spans) -> None:
    unsampled = dataclasses.replace(bench.request(), trace=CLIENT._replace(sampled=False))
    await peers.read(bench.router.open(unsampled))
    await peers.read(bench.router.open(bench.request()))
    assert spans.by_name() == {}


def test_where_tracing_is_off_there_is_no_tracer_and_no_trace_begins(bench: Any) -> None:
    assert ProxyConfig().tracing == "off" and isinstance(bench.router, Router) and bench.router.tracer is None
    assert trace_of(None, None) is None and trace_of(CLIENT, None) == CLIENT
    began = trace_of(None, object())  # type: ignore[arg-type]
    assert began is not None and len(began.trace_id) == 32
