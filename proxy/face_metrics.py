"""What both faces count: every request and how it was answered, those too that never came to the queue."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from ..protocol import metrics as specs
from ..protocol.exporter import counter


class FaceMetrics:
    """Label values are routes and methods that there are, statuses and error codes, never a client's words."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._http = counter(specs.HTTP_REQUESTS, registry)
        self._grpc = counter(specs.GRPC_CALLS, registry)
        self._refusals = counter(specs.REFUSALS, registry)

    def http_request(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    def grpc_call(self, method: str, status: str) -> None:
        self._grpc.labels(method, status).inc()

    def refused(self, face: str, code: str) -> None:
        """face: http, grpc."""
        self._refusals.labels(face, code).inc()
