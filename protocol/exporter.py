"""MetricSpec -> prometheus_client. The one place that imports it, so that the SDK does without."""

from __future__ import annotations

import selectors
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .address import join_address
from .metrics import MetricSpec


def counter(spec: MetricSpec, registry: CollectorRegistry) -> Counter:
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def gauge(spec: MetricSpec, registry: CollectorRegistry) -> Gauge:
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def histogram(spec: MetricSpec, registry: CollectorRegistry) -> Histogram:
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=registry)


class LightCounter(Collector):
    """A counter that is incremented for every token: a plain number of one thread, made into a sample when somebody asks."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        self._spec = spec
        self.value = 0
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._spec.name, self._spec.help, value=self.value)


class LightHistogram(Collector):
    """As LightCounter, a histogram without labels. An observation costs half a microsecond and takes no lock."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        self._spec = spec
        self._counts = [0] * (len(spec.buckets) + 1)  # the last: above all bounds
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._spec.buckets, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [floatToGoString(bound) for bound in (*self._spec.buckets, float("inf"))]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._spec.name, self._spec.help, buckets=buckets, sum_value=self._sum)


def serve_metrics(registry: CollectorRegistry, host: str) -> tuple[str, Callable[[], None]]:
    """Serves /metrics on a free port of host, in a thread. Returns "host:port" and what stops it, at once."""
    kind = _Server6 if ":" in host else _Server
    server = make_server(host, 0, make_wsgi_app(registry), kind, _QuietHandler)
    stopping, stopped = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(server, stopped), name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        stopping.close()
        thread.join()

    return join_address(host, server.server_port), stop


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Prometheus asks all the time."""


def _serve(server: WSGIServer, stopped: socket.socket) -> None:
    """Until the other end of stopped is closed. serve_forever would look for its end twice a second only."""
    with server, stopped, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(stopped, selectors.EVENT_READ)
        while not any(key.fileobj is stopped for key, _ in selector.select()):
            server.handle_request()
