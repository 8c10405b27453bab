"""The file of API keys and tenants, JSON, written by `halfmoon keys` and read by the proxy.

{"tenants": {"acme": {"salt": HEX, "requests_per_minute": 60, …}}, "keys": {ID: {"tenant": "acme", "sha256": HEX, "created": DATE}}}

A key is `hm-ID-SECRET` with 256 random bits, so one round of SHA-256 is enough: there is nothing to guess, and a slow hash would only
slow down each request. The key itself is told once, when it is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...protocol.config import from_mapping
from ...protocol.errors import ConfigError, InvalidRequest
from .whole_file import write_whole

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SALT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSettings:
    salt: str = field(default_factory=lambda: secrets.token_hex(SALT_BYTES), repr=False)
    """Hex. Of its block keys; with another one it finds none of its cached prefixes."""
    requests_per_minute: int = 0
    """0: no limit."""
    tokens_per_minute: int = 0
    """Of prompts and answers; 0: no limit."""
    tokens_per_day: int = 0
    """Likewise, in a day of UTC's calendar."""
    tokens_per_month: int = 0
    first_priority: int = 0
    """Lowest priority number that a request may have, which is the soonest served. May be negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    tenant: str
    sha256: str
    created: str = ""


@dataclass(frozen=True, slots=True)
class KeysFile:
    tenants: Mapping[str, TenantSettings]
    keys: Mapping[str, KeyRecord]  # by id

    @classmethod
    def load(cls, path: Path) -> KeysFile:
        """Raises ConfigError, which tells nothing of what is in the file."""
        try:
            tree = json.loads(path.read_text())
            tenants = {str(name): _tenant(str(name), values) for name, values in tree["tenants"].items()}
            keys = {str(key_id): from_mapping(KeyRecord, values, f"keys.{key_id}") for key_id, values in tree["keys"].items()}
        except OSError as error:
            made = f"`halfmoon keys add TENANT --file {path}` makes it"
            raise ConfigError(f"cannot read the keys in {path}: {error.strerror}; {made}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of keys ({type(error).__name__}); `halfmoon keys` writes one") from error
        for key_id, record in keys.items():
            if record.tenant not in tenants:
                raise ConfigError(f"{path}: the key {key_id} is of {record.tenant!r}, and there is no such tenant")
        return cls(tenants, keys)

    def save(self, path: Path) -> None:
        """At once and whole, readable by its owner alone: whoever reads it meanwhile gets the old one or the new one."""
        tree = {
            "tenants": {name: dataclasses.asdict(settings) for name, settings in self.tenants.items()},
            "keys": {key_id: dataclasses.asdict(record) for key_id, record in self.keys.items()},
        }
        write_whole(path, json.dumps(tree, indent=2))

    def with_key(self, tenant: str, limits: Mapping[str, int]) -> tuple[KeysFile, str]:
        """With one more key of the tenant, and the key. limits: of TenantSettings, changed from now on. Raises InvalidRequest."""
        if not NAME.fullmatch(tenant):
            raise InvalidRequest(f"{tenant!r} cannot name a tenant; use small letters, digits, '.', '_' and '-', at most 64")
        settings = dataclasses.replace(self.tenants.get(tenant, TenantSettings()), **limits)
        key_id = secrets.token_hex(4)
        key = f"hm-{key_id}-{secrets.token_urlsafe(32)}"
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = KeyRecord(tenant=tenant, sha256=digest(key), created=created)
        return KeysFile({**self.tenants, tenant: settings}, {**self.keys, key_id: record}), key

    def without_key(self, key_id: str) -> KeysFile:
        """Its tenant stays, with its salt. Raises InvalidRequest."""
        if key_id not in self.keys:
            raise InvalidRequest(f"there is no key {key_id!r}; `halfmoon keys list` shows their ids")
        return KeysFile(self.tenants, {other: record for other, record in self.keys.items() if other != key_id})


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _tenant(name: str, values: Mapping[str, Any]) -> TenantSettings:
    first_priority = values.get("first_priority", 0)  # the one number that may be negative
    if not isinstance(first_priority, int):
        raise TypeError(name)
    rest = {key: value for key, value in values.items() if key != "first_priority"}
    settings = dataclasses.replace(from_mapping(TenantSettings, rest, f"tenants.{name}"), first_priority=first_priority)
    if len(bytes.fromhex(settings.salt)) != SALT_BYTES:
        raise ValueError(name)
    return settings
