"""What a client shows to be let in: an API key to the proxy's clients' port, the cluster's token to its control."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Control:
    """Where a cluster's operators ask: the proxy's control address, "host:port", and the cluster's token."""

    address: str
    token: str = field(repr=False)

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.token)


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
