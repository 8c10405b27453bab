"""How a process of the cluster proves that it is one: a token that the supervisor makes, and that travels with each call.

supervisor ─► Credentials ─► every member, among what it is started with
           └─► a file of its user ─► halfmoon status, explain, doctor, profile
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .tls import Tls

VARIABLE = "HALFMOON_CLUSTER_TOKEN"
KEY = "halfmoon-token"  # of the metadata
MIN_TOKEN_LEN = 32


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one cluster, the same for all its processes. Nothing shows the token: no repr, no log, no command line.

    tls: of both sides of each connection; None: they talk in the clear.
    """

    token: str = field(repr=False)
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if len(self.token) < MIN_TOKEN_LEN or not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise ConfigError(
                f"a cluster's token must have {MIN_TOKEN_LEN} characters or more, printable ASCII without blanks; "
                f"unset {VARIABLE} to have one made"
            )

    @classmethod
    def make(cls) -> Credentials:
        return cls(secrets.token_urlsafe(32))

    @classmethod
    def from_environment(cls) -> Credentials | None:
        token = os.environ.get(VARIABLE)
        return None if not token else cls(token)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        return ((KEY, self.token),)

    def admit(self, metadata: Iterable[Any]) -> bool:
        """Whether a call with this metadata comes from a process of the cluster. Takes as long for a token that is nearly right."""
        found = next((value for key, value in metadata if key == KEY), "")
        given = found if isinstance(found, bytes) else str(found).encode()
        return hmac.compare_digest(given, self.token.encode())
