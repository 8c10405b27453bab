"""Certificates, as processes hand them to gRPC and to sockets: PEM, in memory. `halfmoon certs` makes them.

authority ─► member: of every process of the cluster, shown and asked for on both sides of each connection
          └► front: of the clients' ports
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError
from .tls_handshake import handshake, load_chain, why

MEMBER_NAME = "halfmoon-member"
"""In the members' certificate, in the place of a host's name: what counts is who signed it, wherever the process runs."""
SAME_AUTHORITY = (
    "`halfmoon certs rotate FOLDER` makes new certificates that get on with the old ones; "
    "for another authority let authority.pem hold both while members change over"
)
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
        return cls(*map(read_pem, member_files(folder)))

    def context(self, *, server_side: bool) -> ssl.SSLContext:
        """For sockets of members: each side shows its certificate and asks for the other's. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=self.authority.decode("ascii"))
            load_chain(context, self.certificate, self.key)
            if server_side:
                context.num_tickets = 0  # no connection is resumed
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the members' certificate can't be used: {error}; `halfmoon certs rotate FOLDER` makes a new one") from error
        return context

    def page_context(self) -> ssl.SSLContext:
        """For a server's sockets whose clients need no certificate of their own. Raises ConfigError."""
        context = self.context(server_side=True)
        context.verify_mode = ssl.CERT_NONE
        return context

    def require_peer(self, peer: Tls) -> None:
        """Both could talk to each other, whoever begins. Takes some milliseconds. Raises ConfigError."""
        for server, client in ((self, peer), (peer, self)):
            try:
                handshake(server.context(server_side=True), client.context(server_side=False), MEMBER_NAME)
            except ssl.SSLError as error:
                raise ConfigError(f"members would refuse each other ({why(error)}); {SAME_AUTHORITY}") from error


def member_files(folder: Path) -> tuple[Path, Path, Path]:
    """Of the authority, of members' certificate, of its key."""
    return folder / f"{AUTHORITY}.pem", folder / f"{MEMBER}.pem", folder / f"{MEMBER}.key"


def read_pem(path: Path) -> bytes:
    """Raises ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `halfmoon certs init FOLDER` makes a folder of certificates") from error
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is no PEM file; `halfmoon certs init FOLDER` makes a folder of certificates")
    return content
