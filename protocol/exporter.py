"""MetricSpec -> prometheus_client. The one place that imports it, so that the SDK does without.

registry ─► ProcessMetrics: worker, role and model_name on every series ─► Prometheus text, or OpenMetrics with exemplars
"""

from __future__ import annotations

import json
import logging
import platform
import selectors
import socket
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, disable_created_metrics, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .address import join_address
from .credentials import Credentials, SocketTls
from .metrics import BUILD_INFO, MetricSpec
from .version import package_version

logger = logging.getLogger(__name__)

SILENCE_S = 10.0  # that a connection of a metrics page may take to ask

disable_created_metrics()  # a series more for each child, which nobody reads


class Identity(NamedTuple):
    """Whose series they are."""

    worker: str  # the process's id, stable across restarts: proxy, prefill-0, store-0
    role: str  # that it has now: proxy, store, prefill, decode, both
    model_name: str


class ProcessMetrics(Collector):
    """What a process serves: its registry, with its identity on every series, and what every process has.

    Args:
        identity: asked for at each scrape, for a worker's role may change.
    """

    def __init__(self, registry: CollectorRegistry, identity: Callable[[], Identity]) -> None:
        self._registry = registry
        self._identity = identity
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        gauge(BUILD_INFO, self._process).labels(package_version(), platform.python_version()).set(1)

    def collect(self) -> Iterator[Metric]:
        identity = self._identity()._asdict()
        for registry in (self._registry, self._process):
            for family in registry.collect():
                named = Metric(family.name, family.documentation, family.type, family.unit)
                # a label of the same name is the metric's own, and says more
                named.samples = [sample._replace(labels={**identity, **sample.labels}) for sample in family.samples]
                yield named


def counter(spec: MetricSpec, registry: CollectorRegistry) -> Counter:
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def gauge(spec: MetricSpec, registry: CollectorRegistry) -> Gauge:
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def histogram(spec: MetricSpec, registry: CollectorRegistry) -> Histogram:
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=registry)


class ReadCounter(Collector):
    """A counter that is kept elsewhere: read() gives (label values, value) when somebody asks."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry, read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]) -> None:
        self._spec = spec
        self._read = read
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._spec.name, self._spec.help, labels=self._spec.labels)
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family


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


def serve_metrics(
    metrics: Collector,
    host: str,
    port: int = 0,
    targets: Callable[[str], Any] | None = None,
    *,
    credentials: Credentials | None = None,
) -> tuple[str, Callable[[], None]]:
    """Serves /metrics on host:port (0: a free one), in a thread. Returns "host:port" and what stops it, at once. Raises OSError.

    targets: what /metrics/targets answers as JSON, from the address that was asked at; called on a thread of its own. None: no such page.
    credentials: of the cluster. With certificates the page shows the members' and asks for none; with a token for metrics it asks for that.
    """
    kind = _Server6 if ":" in host else _Server
    page: Any = make_wsgi_app(metrics)
    if targets is not None:
        page = _with_targets(page, targets)
    if credentials is not None and credentials.metrics_token:
        page = _with_token(page, credentials)
    server = make_server(host, port, page, kind, _QuietHandler)
    server.tls = SocketTls.of_page(credentials)
    stopping, stopped = socket.socketpair()
    thread = threading.Thread(target=_serve, args=(server, stopped), name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        stopping.close()
        thread.join()

    return join_address(host, server.server_port), stop


def _with_targets(page: Any, targets: Callable[[str], Any]) -> Any:
    """The WSGI application with /metrics/targets beside the page."""

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics/targets":
            return page(environ, start_response)
        start_response("200 OK", [("content-type", "application/json")])
        return [json.dumps(targets(environ.get("HTTP_HOST", ""))).encode()]

    return serve


def _with_token(page: Any, credentials: Credentials) -> Any:
    """The WSGI application for those who may read metrics."""

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if credentials.may_read_metrics(environ.get("HTTP_AUTHORIZATION", "")):
            return page(environ, start_response)
        start_response("401 Unauthorized", [("content-type", "text/plain"), ("www-authenticate", "Bearer")])
        return [b"this page asks for the token in security.metrics_token_file: Authorization: Bearer TOKEN\n"]

    return serve


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    tls: SocketTls | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        """On the thread that accepts. The handshake is made on the connection's own, with its first read."""
        accepted, peer = super().get_request()
        if self.tls is not None:
            accepted = self.tls.context().wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        return accepted, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A stranger that speaks no TLS, stays silent or leaves is no news."""
        error = sys.exception()
        if isinstance(error, OSError):
            logger.debug("the metrics page's connection of %s broke: %s", client_address, error)
        else:
            logger.error("the metrics page broke: %s", error, exc_info=error)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Prometheus asks all the time."""


def _serve(server: WSGIServer, stopped: socket.socket) -> None:
    """Until the other end of stopped is closed. serve_forever would look for its end twice a second only."""
    with server, stopped, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(stopped, selectors.EVENT_READ)
        while not any(key.fileobj is stopped for key, _ in selector.select()):
            server.handle_request()
