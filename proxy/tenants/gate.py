"""Whose a key is. The file is looked at for each request, so that a key which is revoked opens nothing from the next request on.

What tenants have used is on disk a second later, written on a thread. A proxy that is killed forgets that second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError, Unauthenticated
from .keys_file import KeysFile, digest
from .tenant import QuotaUse, Tenant
from .usage import Usage
from .usage_file import frozen, load_usage, save_usage

SAVE_EVERY_S = 1.0
SCHEME = "bearer "
HOW = "send the header `Authorization: Bearer KEY`"
logger = logging.getLogger(__name__)


class Gate:
    """Raises ConfigError where a file cannot be read at first, or where a quota cannot be kept.

    Later on the former keys stay then, and the log says so once.

    Args:
        usage_path: of what tenants have used. None: beside path.
        clock: as time.time.
    """

    def __init__(self, path: Path, usage_path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._usage_path = usage_path or path.with_name(f"{path.name}.usage")
        self._clock = clock
        self._used: dict[str, Usage] = load_usage(self._usage_path, clock)  # also of tenants that are no more, until they come again
        self._saved: dict[str, Any] = frozen(self._used)
        self._told = False
        self._closing = asyncio.Event()
        self._tenants: dict[str, Tenant] = {}
        self._by_digest: dict[str, Tenant] = {}
        self._seen = self._look()
        self._read()
        if self._keeps_usage:
            try:
                save_usage(self._usage_path, self._saved)
            except OSError as error:
                told = f"cannot write what tenants have used to {self._usage_path}: {error.strerror}; name another file"
                raise ConfigError(told, key="proxy.usage_file") from error

    @property
    def _keeps_usage(self) -> bool:
        return any(tenant.settings.tokens_per_day or tenant.settings.tokens_per_month for tenant in self._tenants.values())

    async def keep(self, tell: Callable[[list[QuotaUse]], None]) -> None:
        """Has what is used saved and told, until close(); what was used before that is saved then."""
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), SAVE_EVERY_S)
            await self._save(tell)
        await self._save(tell)  # what was used while the last one was written

    def close(self) -> None:
        """Ends keep()."""
        self._closing.set()

    async def _save(self, tell: Callable[[list[QuotaUse]], None]) -> None:
        """If anybody has a quota. A disk that is full loses nothing: it is tried again."""
        tell([use for tenant in self._tenants.values() for use in tenant.quota_uses()])
        now = frozen(self._used)
        if now == self._saved or not self._keeps_usage:
            return
        try:
            await asyncio.to_thread(save_usage, self._usage_path, now)
        except OSError as error:
            if not self._told:
                logger.error("what tenants have used is not in %s yet: %s", self._usage_path, error.strerror)
            self._told = True
        else:
            self._saved, self._told = now, False

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
                usage = self._used.setdefault(name, Usage(self._clock))
                self._tenants[name] = Tenant(name, settings, usage=usage)
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
