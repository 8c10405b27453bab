"""What a client shows to be let in: an API key to the proxy's clients' port, the cluster's token to its control."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError
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
