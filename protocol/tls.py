"""Certificates, as processes hand them to gRPC and to sockets: PEM, in memory. `halfmoon certs` makes them.

authority ─► member: of every process of the cluster, shown and asked for on both sides of each connection
          └► front: of the clients' ports
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError

MEMBER_NAME = "halfmoon-member"
"""In the members' certificate, in the place of a host's name: what counts is who signed it, wherever the process runs."""
AUTHORITY, MEMBER, FRONT = "authority", "member", "front"  # NAME.pem and NAME.key in a folder of certificates


@dataclass(frozen=True, slots=True)
class Tls:
    """One side of mutual TLS: the authority that both trust, and this side's own certificate and key."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def of_members(cls, folder: Path) -> Tls:
        """Raises ConfigError."""
        return cls(read_pem(folder / f"{AUTHORITY}.pem"), read_pem(folder / f"{MEMBER}.pem"), read_pem(folder / f"{MEMBER}.key"))

    def context(self, *, server_side: bool) -> ssl.SSLContext:
        """For sockets of members: each side shows its certificate and asks for the other's. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=self.authority.decode("ascii"))
            _load_chain(context, self.certificate + b"\n" + self.key)
            if server_side:
                context.num_tickets = 0  # no connection is resumed
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the members' certificate can't be used: {error}; `halfmoon certs rotate FOLDER` makes a new one") from error
        return context


def _load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """Python reads a certificate and its key from a file alone: this one is in memory, and nobody else can open it."""
    descriptor = os.memfd_create("halfmoon-member")
    with open(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")


def read_pem(path: Path) -> bytes:
    """Raises ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `halfmoon certs init FOLDER` makes a folder of certificates") from error
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is no PEM file; `halfmoon certs init FOLDER` makes a folder of certificates")
    return content
