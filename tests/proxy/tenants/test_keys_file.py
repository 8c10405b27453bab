"""proxy/tenants/keys_file.py: keys at rest."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path

import pytest

from halfmoon.protocol.errors import ConfigError, InvalidRequest
from halfmoon.proxy.tenants.keys_file import KeysFile

EMPTY = KeysFile({}, {})


def test_a_key_is_at_rest_as_its_hash_alone_and_the_file_its_owner_s(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file, key = EMPTY.with_key("acme", {"requests_per_minute": 60})
    file.save(path)
    assert re.fullmatch(r"hm-[0-9a-f]{8}-[A-Za-z0-9_-]{43}", key)
    text = path.read_text()
    assert key not in text and key.rsplit("-", 1)[1] not in text and hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    assert KeysFile.load(path) == file and repr(file.tenants["acme"].salt) not in repr(file)


def test_a_tenant_keeps_its_salt_over_keys_and_no_two_tenants_have_the_same() -> None:
    file, first = EMPTY.with_key("acme", {})
    file, second = file.with_key("acme", {"tokens_per_minute": 5})
    file, _ = file.with_key("other", {})
    salts = {name: settings.salt for name, settings in file.tenants.items()}
    assert first != second and salts["acme"] != salts["other"] and len(bytes.fromhex(salts["acme"])) == 32
    (revoked,) = [key_id for key_id in file.keys if first.startswith(f"hm-{key_id}-")]
    without = file.without_key(revoked)
    assert revoked not in without.keys and without.tenants["acme"].salt == salts["acme"] and without.tenants["acme"].tokens_per_minute == 5
    with pytest.raises(InvalidRequest, match="there is no key"):
        without.without_key(revoked)


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "x" * 65, "ü"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a tenant"):
        EMPTY.with_key(name, {})


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("keys"),
        lambda tree: tree["tenants"]["acme"].update(salt="00"),
        lambda tree: tree["tenants"]["acme"].update(salt="no hex"),
        lambda tree: tree["tenants"]["acme"].update(requests_per_minute=-1),
        lambda tree: tree["tenants"]["acme"].update(first_priority="high"),
        lambda tree: tree["tenants"]["acme"].update(unknown=1),
        lambda tree: next(iter(tree["keys"].values())).update(tenant="nobody"),
        lambda tree: tree.update(tenants=[1]),
    ],
)
def test_a_file_that_is_wrong_is_one_error_without_its_secrets(change: object, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    EMPTY.with_key("acme", {"first_priority": -3})[0].save(path)
    assert KeysFile.load(path).tenants["acme"].first_priority == -3
    tree = json.loads(path.read_text())
    secret = tree["tenants"]["acme"]["salt"]
    change(tree)  # type: ignore[operator]
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        KeysFile.load(path)
    assert secret not in str(caught.value)


def test_no_file_is_told_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="halfmoon keys add"):
        KeysFile.load(tmp_path / "none.json")
