"""`halfmoon keys`: what is printed once, listed and revoked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from halfmoon.deploy.cli import app
from halfmoon.proxy.tenants.keys_file import KeysFile, digest


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_printed_once_listed_by_its_id_and_revoked(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    added = run("add", "acme", "--file", file, "--requests-per-minute", "60", "--first-priority", "-1")
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    known = KeysFile.load(Path(file))
    assert [record.sha256 for record in known.keys.values()] == [digest(key)]
    second = run(
        "add", "acme", "--file", file, "--tokens-per-minute", "1000", "--tokens-per-day", "50000", "--tokens-per-month", "700000"
    ).stdout.strip()
    limits = KeysFile.load(Path(file)).tenants["acme"]
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.first_priority) == (60, 1000, -1), "what is not given stays"
    assert (limits.tokens_per_day, limits.tokens_per_month) == (50000, 700000)
    listed = run("list", "--file", file).stdout
    assert all(word in listed for word in (key.split("-")[1], second.split("-")[1], "acme", "60", "1000", "50000", "700000"))
    assert key not in listed and key.split("-", 2)[2] not in listed and limits.salt not in listed
    assert run("revoke", key.split("-")[1], "--file", file).exit_code == 0
    assert [record.sha256 for record in KeysFile.load(Path(file)).keys.values()] == [digest(second)]


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    for arguments in (["list"], ["revoke", "x"], ["add", "Not A Name"]):
        result = run(*arguments, "--file", file)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "Traceback" not in result.output, result.output
    assert run("add", "acme", "--file", str(tmp_path / "none" / "keys.json")).exit_code == 1
