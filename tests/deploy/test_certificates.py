"""deploy/certificates.py and `halfmoon certs`, read back with openssl's own verification."""

from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfmoon.deploy.cli import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["certs", *arguments])


def test_init_makes_an_authority_and_what_it_signs_and_rotate_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    made = run("init", str(folder), "--name", "cluster.example", "--name", "10.1.2.3")
    assert made.exit_code == 0 and "localhost, 127.0.0.1, ::1, cluster.example, 10.1.2.3" in made.stdout
    names = {"authority", "member", "front"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("pem", "key")}
    assert all(stat.S_IMODE((folder / f"{name}.key").stat().st_mode) == 0o600 for name in names)
    again = run("init", str(folder))
    assert again.exit_code == 1 and "has an authority already" in again.stderr
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "cluster.example, 10.1.2.3" in run("rotate", str(folder)).stdout
    changed = {name for name, content in before.items() if (folder / name).read_bytes() != content}
    assert changed == {"member.pem", "member.key", "front.pem", "front.key"}
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    for name in ("member", "front"):
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")  # they belong together


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")
def test_openssl_verifies_them_for_what_they_are_for(tmp_path: Path) -> None:
    run("init", str(tmp_path / "a"))
    run("init", str(tmp_path / "b"))

    def verified(authority: str, name: str, purpose: str) -> bool:
        command = ["openssl", "verify", "-CAfile", str(tmp_path / authority / "authority.pem"), "-purpose", purpose, "-x509_strict"]
        return subprocess.run([*command, str(tmp_path / "a" / f"{name}.pem")], capture_output=True).returncode == 0

    assert verified("a", "member", "sslclient") and verified("a", "member", "sslserver") and verified("a", "front", "sslserver")
    assert not verified("a", "front", "sslclient"), "who has the front's key is no member"
    assert not verified("b", "member", "sslclient")
