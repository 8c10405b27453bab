"""How a process of the cluster proves that it is one: a token that the supervisor makes, and that travels with each call.

supervisor ─► Credentials ─► every member, among what it is started with
           └─► a file of its user ─► halfmoon status, explain, doctor, profile
"""

from __future__ import annotations

import hmac
import os
import secrets
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .tls import Tls

VARIABLE = "HALFMOON_CLUSTER_TOKEN"
KEY = "halfmoon-token"  # of the metadata
MIN_TOKEN_LEN = 32
FORM = f"{MIN_TOKEN_LEN} characters or more, printable ASCII without blanks"
BEARER = "bearer "


@dataclass(slots=True)
class Credentials:
    """Of one cluster, the same for all its processes. Nothing shows the token: no repr, no log, no command line.

    A process has one, and what opens or takes connections looks at it for each: the token stays, certificates may be renewed.
    tls: of both sides of each connection; None: they talk in the clear.
    metrics_token: opens the metrics pages and nothing else; "": they are open to all.
    """

    token: str = field(repr=False)
    tls: Tls | None = None
    metrics_token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not _can_be_token(self.token):
            raise ConfigError(f"a cluster's token must have {FORM}; unset {VARIABLE} to have one made")
        if self.metrics_token and not _can_be_token(self.metrics_token):
            raise ConfigError(f"the metrics pages' token must have {FORM}; `openssl rand -hex 32` makes one")

    @classmethod
    def make(cls) -> Credentials:
        return cls(secrets.token_urlsafe(32))

    @classmethod
    def from_environment(cls) -> Credentials | None:
        token = os.environ.get(VARIABLE)
        return None if not token else cls(token)

    def renew(self, tls: Tls) -> None:
        """New certificates, for new connections. Takes some milliseconds. Raises ConfigError, and all stays as it was.

        Members change over one after the other: both must get on with each other, unless what counts now has expired anyway.
        """
        if self.tls is None:
            raise ConfigError("the cluster was started without certificates; set security.certs, and start it anew")
        tls.require_peer(tls)
        try:
            self.tls.require_peer(self.tls)
        except ConfigError:
            pass
        else:
            tls.require_peer(self.tls)
        self.tls = tls

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        return ((KEY, self.token),)

    def admit(self, metadata: Iterable[Any]) -> bool:
        """Whether a call with this metadata comes from a process of the cluster. Takes as long for a token that is nearly right."""
        found = next((value for key, value in metadata if key == KEY), "")
        given = found if isinstance(found, bytes) else str(found).encode()
        return hmac.compare_digest(given, self.token.encode())

    def may_read_metrics(self, authorization: str) -> bool:
        """authorization: the header's value of who asks for a metrics page. Processes of the cluster bring the cluster's token."""
        if not self.metrics_token:
            return True
        given = authorization[len(BEARER) :].strip().encode() if authorization[: len(BEARER)].lower() == BEARER else b""
        return any(hmac.compare_digest(given, known.encode()) for known in (self.metrics_token, self.token))


def read_token(path: Path) -> str:
    """Without the blanks around it. Raises ConfigError, which tells nothing of what is in the file."""
    try:
        return path.expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the token in {path}: {why}; `openssl rand -hex 32 > {path}` makes one") from error


def _can_be_token(text: str) -> bool:
    return len(text) >= MIN_TOKEN_LEN and text.isascii() and text.isprintable() and " " not in text


class SocketTls:
    """The context for each new socket, with the certificates that count then. Any thread."""

    def __init__(self, credentials: Credentials, make: Callable[[Tls], ssl.SSLContext]) -> None:
        self._credentials = credentials
        self._make = make
        self._made: tuple[Tls, ssl.SSLContext] | None = None

    @classmethod
    def of_client(cls, credentials: Credentials | None) -> SocketTls | None:
        """Mutual. None: in the clear."""
        return cls._of(credentials, lambda tls: tls.context(server_side=False))

    @classmethod
    def of_server(cls, credentials: Credentials | None) -> SocketTls | None:
        """Mutual. None: in the clear."""
        return cls._of(credentials, lambda tls: tls.context(server_side=True))

    @classmethod
    def of_page(cls, credentials: Credentials | None) -> SocketTls | None:
        """Of a server that asks for no certificate. None: in the clear."""
        return cls._of(credentials, Tls.page_context)

    @classmethod
    def _of(cls, credentials: Credentials | None, make: Callable[[Tls], ssl.SSLContext]) -> SocketTls | None:
        return None if credentials is None or credentials.tls is None else cls(credentials, make)

    def context(self) -> ssl.SSLContext:
        tls, made = self._credentials.tls, self._made
        assert tls is not None, "a cluster that has certificates keeps having some"
        if made is None or made[0] is not tls:
            made = self._made = tls, self._make(tls)
        return made[1]
