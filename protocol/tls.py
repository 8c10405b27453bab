"""Certificates, as processes hand them to gRPC: PEM, in memory. `halfmoon certs` makes them.

authority ─► member: of every process of the cluster, shown and asked for on both sides of each connection
          └► front: of the clients' ports
"""

from __future__ import annotations

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


def read_pem(path: Path) -> bytes:
    """Raises ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `halfmoon certs init FOLDER` makes a folder of certificates") from error
    if b"-----BEGIN " not in content:
        raise ConfigError(f"{path} is no PEM file; `halfmoon certs init FOLDER` makes a folder of certificates")
    return content
