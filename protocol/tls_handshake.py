"""Certificates tried out before they count: a whole TLS handshake, in memory."""

from __future__ import annotations

import os
import ssl

MAX_TURNS = 10  # TLS 1.3 needs two of each side


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> None:
    """name: that the client asks for. Raises ssl.SSLError where either side refuses the other: dates, names, authorities, keys."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(MAX_TURNS):
        left = [side for side in left if not _has_shaken(side)]
    if left:
        raise ssl.SSLError("the handshake does not end")


def why(error: ssl.SSLError) -> str:
    """For messages."""
    return getattr(error, "verify_message", "") or error.reason or str(error)


def load_chain(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """PEM. Also into a context that is in use, for its next connections. Raises ssl.SSLError.

    Python reads a certificate and its key from a file alone: this one is in memory, and nobody else can open it.
    """
    descriptor = os.memfd_create("halfmoon-certificate")
    with open(descriptor, "wb") as file:
        file.write(certificate + b"\n" + key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_refuse_password)


def _refuse_password() -> str:
    raise ssl.SSLError("the key has a password; a process that starts by itself has nobody to ask")


def _has_shaken(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
