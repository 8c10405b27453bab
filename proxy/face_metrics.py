"""What both faces count: every request and how it was answered, those too that never came to the queue."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from ..protocol import metrics as specs
from ..protocol.exporter import counter, gauge


class FaceMetrics:
    """Label values are routes and methods that there are, statuses, error codes and tenants' names, never a client's words."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._http = counter(specs.HTTP_REQUESTS, registry)
        self._grpc = counter(specs.GRPC_CALLS, registry)
        self._refusals = counter(specs.REFUSALS, registry)
        self._quotas = gauge(specs.QUOTA_USED, registry)

    def http_request(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    def grpc_call(self, method: str, status: str) -> None:
        self._grpc.labels(method, status).inc()

    def refused(self, face: str, code: str) -> None:
        """face: http, grpc."""
        self._refusals.labels(face, code).inc()

    def quotas(self, used: Iterable[tuple[str, str, float]]) -> None:
        """(tenant, period, share used) of all that there are now."""
        self._quotas.clear()
        for tenant, period, ratio in used:
            self._quotas.labels(tenant, period).set(ratio)
