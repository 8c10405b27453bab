"""How every gRPC channel and server of Halfmoon is opened: message size, keepalive, an ephemeral port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc.aio

from .address import join_address
from .credentials import Credentials
from .front_tls import FrontCertificate, Pair
from .members_only import MemberChannel, MembersOnly
from .parsing import Parsing
from .tls import MEMBER_NAME, Tls

Certificates = TypeVar("Certificates")

# Between members message size is bounded by who sends (slices of a few MiB), not by gRPC's 4 MiB default.
# Keepalive finds a peer that is stopped, or whose host vanished without closing its sockets, after 5 + 3 s at most; a killed process is
# seen at once without it. What waits for the answer to a keepalive ping is the ping's own timeout, 60 s by default, whatever
# keepalive_timeout says: that one is of the socket.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_ping_strikes", 0),
    # a restarted peer listens on the same port: look again soon, not after gRPC's 20 s to 2 min
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


CHANNEL_OPTIONS = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))


def open_channel(address: str, credentials: Credentials | None = None, authority: bytes | None = None) -> grpc.aio.Channel:
    """address: "host:port". Connects on first use.

    credentials: of a member, to be shown with each call; None: at the clients' port. authority: there, PEM of who signed its certificate
    (b"": one that this machine trusts); None: it has no TLS.
    """
    if credentials is None:
        return _open(address, None, authority)
    return MemberChannel(lambda: _open(address, credentials, None), credentials)


def _open(address: str, credentials: Credentials | None, authority: bytes | None) -> grpc.aio.Channel:
    secret, options = channel_credentials(credentials, authority)
    if secret is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, secret, options=options)


def channel_credentials(
    credentials: Credentials | None, authority: bytes | None
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, int | str]]]:
    """Of TLS, and the channel's options. None: it has no TLS."""
    if credentials is not None and (tls := credentials.tls) is not None:
        secret = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)
        return secret, [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", MEMBER_NAME)]
    return None if authority is None else grpc.ssl_channel_credentials(authority or None), [*CHANNEL_OPTIONS]


def create_server(
    host: str,
    port: int,
    *,
    credentials: Credentials | None = None,
    certificate: FrontCertificate | None = None,
    max_request_bytes: int = -1,
    handshake_timeout_s: float = 10.0,
) -> tuple[grpc.aio.Server, int]:
    """A server bound to host:port and the port it got (port 0: any free one). Not started.

    credentials: what each call must bring, and each connection where they have TLS; None: it serves whoever reaches it.
    certificate: there, of the port; None: without TLS. Each connection gets the certificates that count when it begins.
    max_request_bytes: of one message, where strangers may send them; a larger one is refused unread. -1: any size.
    handshake_timeout_s: for a new connection to speak HTTP/2; it is closed then.
    Raises OSError where the port is taken. A server that is not started after all has to be closed with close_server.
    """
    options = dict(OPTIONS) | {"grpc.max_receive_message_length": max_request_bytes, "grpc.so_reuseport": 0}
    options["grpc.server_handshake_timeout_ms"] = max(1, round(handshake_timeout_s * 1e3))
    guards = () if credentials is None else (MembersOnly(credentials),)
    server = grpc.aio.server(interceptors=(*guards, Parsing()), options=list(options.items()))
    address = join_address(host, port)
    secret = _server_credentials(credentials, certificate)
    bound = server.add_insecure_port(address) if secret is None else server.add_secure_port(address, secret)
    if bound == 0:
        raise OSError(f"cannot listen on {address}: the port is taken; choose another")
    return server, bound


async def close_server(server: grpc.aio.Server, grace_s: float | None = None) -> None:
    """Stops it, and frees its port, whether or not it was ever started. gRPC keeps the port of one that never ran. Idempotent."""
    try:
        await server.start()
    except grpc.aio.UsageError:  # it runs, or has stopped
        pass
    await server.stop(grace_s)


def _server_credentials(credentials: Credentials | None, certificate: FrontCertificate | None) -> grpc.ServerCredentials | None:
    if credentials is not None:
        return None if credentials.tls is None else _as_they_are_now(lambda: credentials.tls, _of_member, mutual=True)
    return None if certificate is None else _as_they_are_now(lambda: certificate.now, _of_front, mutual=False)


def _as_they_are_now(
    now: Callable[[], Certificates], configuration: Callable[[Certificates], grpc.ServerCertificateConfiguration], *, mutual: bool
) -> grpc.ServerCredentials:
    given = now()

    def fetch() -> Any:
        """gRPC asks before each handshake, on threads of its own. None: as before."""
        nonlocal given
        found = now()
        if found is given:
            return None
        given = found
        return configuration(found)

    return grpc.dynamic_ssl_server_credentials(configuration(given), fetch, mutual)


def _of_member(tls: Tls | None) -> grpc.ServerCertificateConfiguration:
    assert tls is not None, "a cluster that has certificates keeps having some"
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.authority)


def _of_front(pair: Pair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([pair])
