"""Whose a key is. The file is looked at for each request, so that a key which is revoked opens nothing from the next request on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError, Unauthenticated
from .keys_file import KeysFile, digest
from .tenant import Tenant

SCHEME = "bearer "
HOW = "send the header `Authorization: Bearer KEY`"
logger = logging.getLogger(__name__)


class Gate:
    """Raises ConfigError where the file cannot be read at first. Later on the former keys stay then, and the log says so once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tenants: dict[str, Tenant] = {}
        self._by_digest: dict[str, Tenant] = {}
        self._seen = self._look()
        self._read()

    def tenant_of(self, authorization: str) -> Tenant:
        """authorization: the header's value. Raises Unauthenticated, whose text holds nothing of it."""
        if (seen := self._look()) != self._seen:
            self._seen = seen
            self._read_again()
        if authorization[: len(SCHEME)].lower() != SCHEME:
            raise Unauthenticated(f"this server asks for an API key, and the request brought none; {HOW}")
        # by its hash: how long the look-up takes tells nothing of the keys that there are
        tenant = self._by_digest.get(digest(authorization[len(SCHEME) :].strip()))
        if tenant is None:
            raise Unauthenticated(f"the API key is not known here, or was revoked; {HOW} with one that `halfmoon keys add` has made")
        return tenant

    def tenant_of_call(self, metadata: Iterable[Any]) -> Tenant:
        """As tenant_of, for a gRPC call."""
        found = next((value for key, value in metadata or () if key == "authorization"), "")
        return self.tenant_of(found if isinstance(found, str) else "")

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> None:
        file = KeysFile.load(self._path)
        for name in self._tenants.keys() - file.tenants.keys():
            del self._tenants[name]
        for name, settings in file.tenants.items():
            known = self._tenants.get(name)
            if known is None:
                self._tenants[name] = Tenant(name, settings)
            else:
                known.change(settings)
        self._by_digest = {record.sha256: self._tenants[record.tenant] for record in file.keys.values()}

    def _read_again(self) -> None:
        try:
            self._read()
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error.message)
        else:
            logger.info("%d API keys of %d tenants", len(self._by_digest), len(self._tenants))
