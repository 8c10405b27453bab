"""Where a client connects, and what it shows to be let in: an API key to the proxy's clients' port, the cluster's token to its control."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError, shown
from ..protocol.tls import Tls

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Control:
    """Where a cluster's operators ask: the proxy's control address, "host:port", and the cluster's token.

    certs: folder of the cluster's certificates, where its members talk by TLS.
    """

    address: str
    token: str = field(repr=False)
    certs: str = ""

    @property
    def credentials(self) -> Credentials:
        """Raises ConfigError for a folder without them."""
        return Credentials(self.token, Tls.of_members(Path(self.certs)) if self.certs else None)


def checked_address(address: str) -> str:
    """Raises ConfigError for what is no "host:port"."""
    if re.match(r"(unix|dns|ipv4|ipv6):", address):  # gRPC's own names
        return address
    if "://" in address:
        raise ConfigError(f"{shown(address)} is a URL; a client speaks gRPC, so give the address as host:port, such as 127.0.0.1:50051")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"the address is {shown(address)}; it must be host:port, such as 127.0.0.1:50051")
    return address


def key_metadata(api_key: str) -> Metadata:
    """Of each call. "": none."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def require_control(control: Control | None) -> Control:
    """Raises ConfigError."""
    if control is None:
        raise ConfigError(
            "status and explain are asked at the proxy's control address; make the client with control=Control(address, token)"
        )
    return control
