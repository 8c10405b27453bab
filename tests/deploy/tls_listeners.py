"""What each port of a cluster with TLS shows to a new connection, and whom it takes. `from halfmoon.tests.deploy.tls_listeners import …`"""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from halfmoon.kvstore.data_wire import HELLO, MAGIC, TOKEN_BYTES
from halfmoon.protocol.address import join_address, split_address
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.tls import Tls
from halfmoon.protocol.v1 import control_pb2, kvstore_pb2, kvstore_pb2_grpc

HANGS_AFTER_S = 60.0


@dataclass(frozen=True)
class Listener:
    what: str
    address: str
    protocols: tuple[str, ...] = ()  # that TLS is told; gRPC wants h2
    is_front: bool = False  # shows the clients' ports' certificate
    is_mutual: bool = False  # asks for a member's certificate
    greeting: bytes = b""  # that it waits for; gRPC speaks first

    def shown(self, authority: bytes) -> str:
        """The certificate, PEM. Raises ssl.SSLCertVerificationError where the authority has not signed it."""
        context = ssl.create_default_context(cadata=authority.decode())
        context.check_hostname = False
        with self._connected(context) as connection:
            return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")

    def takes(self, tls: Tls) -> bool:
        """Whether it goes on with who shows this certificate. It is the server alone that judges."""
        context = tls.context(server_side=False)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            with self._connected(context) as connection:
                connection.sendall(self.greeting)
                return connection.read(1) != b""
        except (ssl.SSLError, ConnectionError):
            return False

    def _connected(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        if self.protocols:
            context.set_alpn_protocols(list(self.protocols))
        connection = socket.create_connection(split_address(self.address), HANGS_AFTER_S)
        try:
            return context.wrap_socket(connection)
        except BaseException:
            connection.close()
            raise


async def listeners_of(cluster: Any) -> list[Listener]:
    """All of a running cluster."""
    supervisor, members = cluster.supervisor, [member.info for member in (await cluster.status()).members]
    found = [
        Listener("HTTP", supervisor.http_address, is_front=True),
        Listener("gRPC", supervisor.grpc_address, ("h2",), is_front=True),
        Listener("control", supervisor.control_address, ("h2",), is_mutual=True),
        Listener("metrics", supervisor.metrics_address),
    ]
    found += [Listener(info.id, info.address, ("h2",), is_mutual=True) for info in members]
    found += [Listener(f"metrics of {info.id}", info.metrics_address) for info in members]
    schema = next(info.schema for info in members if info.role != control_pb2.ROLE_STORE)
    stranger = HELLO.pack(MAGIC, bytes(TOKEN_BYTES))
    for store in [info for info in members if info.role == control_pb2.ROLE_STORE]:
        port = await data_port(store.address, supervisor.credentials, schema)
        host, _ = split_address(store.address)
        found.append(Listener(f"data of {store.id}", join_address(host, port), is_mutual=True, greeting=stranger))
    return found


async def data_port(address: str, credentials: Credentials, schema: Any) -> int:
    """As a client on another node is told it."""
    hello = kvstore_pb2.AttachRequest.Hello(client_id="test", node_id="elsewhere", schema=schema)
    async with open_channel(address, credentials) as channel:
        call: Any = kvstore_pb2_grpc.KVStoreStub(channel).Attach()
        await call.write(kvstore_pb2.AttachRequest(hello=hello))
        reply = await asyncio.wait_for(call.read(), HANGS_AFTER_S)
        call.cancel()
    return reply.welcome.data.port
