"""The proxy as one process: both faces and the core on one event loop.

ProxyServer ── HTTP: OpenAI's routes, /health, /ready                    ┐
            ── gRPC: Inference · health · reflection                      ├─► Generator ─► Router ─► Cluster
            ── on control_host: gRPC Control, with the token · /metrics  ─┘
stop: health says no ─► no new requests ─► the last one ends, or grace_s ─► listeners close ─► members leave
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from ..protocol.address import LOOPBACK, join_address
from ..protocol.channel import close_server, create_server
from ..protocol.config import ModelOptions, ProxyConfig
from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError
from ..protocol.exporter import Identity, ProcessMetrics, serve_metrics
from ..protocol.front_tls import FrontCertificate
from ..protocol.schema import KVSchema
from ..protocol.tasks import Tasks, beside
from ..protocol.tls_handshake import load_chain
from ..protocol.v1 import control_pb2_grpc, inference_pb2
from ..protocol.watched_files import WatchedFiles
from .control_service import ControlService
from .inference_service import InferenceService
from .members.cluster import Cluster
from .metrics import ProxyMetrics
from .metrics_targets import targets
from .model_card import ModelCard
from .openai.connection import Connection
from .openai.http import create_app
from .request_process import RequestProcess
from .requests.generation import Generator
from .requests.router import Router
from .tenants.gate import Gate
from .text.answer_form import AnswerForms
from .text.tokenizer import Tokenizer
from .tracing import otlp_tracer

logger = logging.getLogger(__name__)

SERVICES = (inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,)
# A live stream is about 300 objects. A full collection goes through those of all streams, 50 ms and more for 256 of them, and most
# garbage is freed without one. Young objects are looked through 2,000 at a time, and all of them once in thousands of requests.
GC_THRESHOLDS = (2_000, 5, 100)
UNSENT_BYTES = 2**16
"""Of a connection, in the kernel. It would take megabytes, so that nobody would notice a client that does not read."""
CLOSE_GRACE_S = 1.0  # for connections still in use after every request has ended


class Endpoints(NamedTuple):
    """Each is "host:port"."""

    http: str
    grpc: str
    control: str
    metrics: str


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process's entry point decides what a signal means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()


class ProxyServer:
    """Can be started and stopped once.

    Args:
        model_folder: holds config.json and the tokenizer; no weights are read.
        schema: the KV format that workers must have.
        credentials: of the cluster, for members and operators. None: new ones.
    """

    def __init__(
        self, *, config: ProxyConfig, options: ModelOptions, model_folder: Path, schema: KVSchema, credentials: Credentials | None = None
    ) -> None:
        self.credentials = credentials or Credentials.make()
        self.registry = CollectorRegistry()
        self._config = config
        self._options = options
        self._model_folder = model_folder
        metrics = ProxyMetrics(self.registry)
        self.card = ModelCard.from_folder(model_folder, options, schema.dtype)
        self.cluster = Cluster(metrics, schema, self.credentials)
        self._tracer = otlp_tracer(self.card.name) if config.tracing == "otlp" else None
        self.router = Router(config, self.cluster, metrics, eos_token_ids=self.card.eos_token_ids, tracer=self._tracer)
        self._request_process = RequestProcess()
        self._front = FrontCertificate(Path(config.tls_certificate), Path(config.tls_key)) if config.tls_key else None
        usage_file = Path(config.usage_file) if config.usage_file else None
        self._gate = Gate(Path(config.keys_file), usage_file) if config.keys_file else None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - made by its __init__
        self._grpc: grpc.aio.Server | None = None
        self._control: grpc.aio.Server | None = None
        self._stop_metrics: Callable[[], None] | None = None
        self._listener: socket.socket | None = None
        self._http: _HttpServer | None = None
        self._tasks = Tasks("the proxy")
        self._front_looks: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._http_task: asyncio.Task[None] | None = None

    async def start(self) -> Endpoints:
        """All listen when it returns. Raises CheckpointError, or ConfigError if a port is taken, and nothing listens any more then."""
        try:
            return await self._start()
        except BaseException:
            await self.stop(0.0)
            raise

    async def _start(self) -> Endpoints:
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, self._model_folder, self._options.special_tokens_in_text)
        config = self._config
        forms = AnswerForms.chosen(tokenizer, self._options)
        generator = Generator(self.router, tokenizer, self.card, config.default_timeout_s, forms)
        self._listener = http_socket = _listen(config.host, config.http_port)
        self._grpc, grpc_port = self._bind(config.host, "grpc_port", None)
        control_host = config.control_host or LOOPBACK
        self._control, control_port = self._bind(control_host, "control_port", self.credentials)
        metrics_address = self._serve_metrics(control_host)
        if self.router.kv_events is not None:
            self.router.kv_events.start()
        await self._start_grpc(self._grpc, generator)
        control_pb2_grpc.add_ControlServicer_to_server(ControlService(self.router, self.card.name), self._control)
        await self._control.start()
        await self._start_http(http_socket, generator)
        if self._front is not None:
            files = WatchedFiles("the clients' ports' certificate and key", self._front.paths, self.renew_front)
            self._front_looks = self._tasks.spawn(files.run(), "looking for a new certificate of the clients' ports")
        if self._gate is not None:
            self._keeping = self._tasks.spawn(self._gate.keep(self.router.metrics.faces.quotas), "saving what tenants have used")
        endpoints = Endpoints(
            http=join_address(config.host, http_socket.getsockname()[1]),
            grpc=join_address(config.host, grpc_port),
            control=join_address(control_host, control_port),
            metrics=metrics_address,
        )
        scheme = "https" if self._front is not None else "http"
        logger.info("serving %s at %s://%s (OpenAI) and %s (gRPC)", self.card.name, scheme, endpoints.http, endpoints.grpc)
        if told := self.card.told():
            logger.info("requests that say nothing of it are sampled as generation_config.json recommends: %s", told)
        if told := forms.told():
            logger.info("of chats' answers are read: %s", told)
        return endpoints

    def _bind(self, host: str, key: str, credentials: Credentials | None) -> tuple[grpc.aio.Server, int]:
        """A server and its port. key: the port's, in the configuration. Raises ConfigError."""
        config, port = self._config, getattr(self._config, key)
        max_bytes = config.max_body_bytes if credentials is None else -1
        try:
            return create_server(
                host,
                port,
                credentials=credentials,
                certificate=self._front if credentials is None else None,
                max_request_bytes=max_bytes,
                handshake_timeout_s=config.head_timeout_s,
            )
        except (OSError, RuntimeError) as error:
            raise _port_taken(host, port, key) from error

    def _serve_metrics(self, host: str) -> str:
        identity = Identity("proxy", "proxy", self.card.name)

        def found(address: str) -> Any:
            return targets(identity, address, list(self.cluster.members.values()), has_tls=self.credentials.tls is not None)

        metrics = ProcessMetrics(self.registry, lambda: identity)
        try:
            address, self._stop_metrics = serve_metrics(metrics, host, self._config.metrics_port, found, credentials=self.credentials)
        except OSError as error:
            raise _port_taken(host, self._config.metrics_port, "metrics_port") from error
        return address

    def warm_up(self) -> None:
        """To be called after the start, in a process that runs only this server.

        Objects that exist now live as long as the process. They are hidden from the garbage collector, because a full collection
        through all imported modules holds the event loop for 100 ms and more. Later objects are collected less often. The process for
        large requests is started as well: otherwise the first large request would wait a second for it.
        """
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._request_process.warm_up()

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, waits up to grace_s for those under way, cancels the rest and closes. Idempotent."""
        await self._health.enter_graceful_shutdown()
        num_left = await self.router.drain(grace_s)
        if num_left:
            logger.warning("%d requests were still under way after %.1f s; cancelled", num_left, grace_s)
        await self.router.close()
        if self._front_looks is not None:
            self._front_looks.cancel()
        if self._keeping is not None and self._gate is not None:
            self._gate.close()
            await asyncio.wait({self._keeping})
        if self._http is not None and self._http_task is not None:
            self._http.should_exit = True
            await self._http_task
        await self.cluster.close()
        for server in (self._grpc, self._control):
            if server is not None:
                await close_server(server, CLOSE_GRACE_S)
        if self._listener is not None:
            self._listener.close()
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        await self._request_process.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _start_grpc(self, server: grpc.aio.Server, generator: Generator) -> None:
        InferenceService(generator, self._request_process, self._gate).add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await server.start()

    async def _start_http(self, listener: socket.socket, generator: Generator) -> None:
        app: Any = create_app(generator, self._request_process, self._gate)
        connection: Any = partial(Connection, self._config, self.router.metrics.faces)
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",
            log_config=None,
            log_level="error",  # it warns of each request that is no HTTP, and a stranger could fill the log
            access_log=False,
            lifespan="off",
            ssl_certfile=self._config.tls_certificate or None,
            ssl_keyfile=self._config.tls_key or None,
            timeout_graceful_shutdown=int(CLOSE_GRACE_S),
        )
        self._http = _HttpServer(config)
        self._http_task = self._tasks.start(self._http.serve(sockets=[listener]))
        async with beside(self._http.accepting.wait()) as accepting:
            await asyncio.wait((self._http_task, accepting), return_when=asyncio.FIRST_COMPLETED)
        if self._http_task.done():
            ended, self._http_task = self._http_task, None
            ended.result()  # raises the error that kept it from starting

    async def renew_front(self) -> None:
        """Reads the clients' ports' certificate anew, for new connections. Raises ConfigError, and all stays as it was."""
        assert self._front is not None and self._http is not None and self._http.config.ssl is not None
        found = await asyncio.to_thread(self._front.read)
        if found == self._front.now:
            return
        load_chain(self._http.config.ssl, found.certificate, found.key)  # on the loop, which makes its connections
        self._front.now = found
        logger.info("the clients' ports show a new certificate from now on")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # "::" is every address of the machine, IPv4 included, as in gRPC
        listener = socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6()
        )
    except OSError as error:
        raise _port_taken(host, port, "http_port") from error
    # Accepted sockets inherit it. asyncio sets it only if the protocol number is IPPROTO_TCP, and create_server leaves that 0.
    # Without it a reply's body waits for the client's delayed ACK of its head, about 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return listener


def _port_taken(host: str, port: int, key: str) -> ConfigError:
    return ConfigError(
        f"cannot listen on {join_address(host, port)}: the port is taken, or the address is not this machine's; "
        f"choose another proxy.{key}, or 0 for any free one",
        key=f"proxy.{key}",
    )
