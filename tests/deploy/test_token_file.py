"""deploy/token_file.py: how `halfmoon status` finds the token of the cluster that its user has started."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from halfmoon.client import Control
from halfmoon.deploy.token_file import find_control, token_file
from halfmoon.protocol.credentials import VARIABLE, Credentials
from halfmoon.protocol.errors import ConfigError

OURS = Credentials.make()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def test_the_token_is_readable_by_its_user_alone_and_gone_at_the_end(home: Path) -> None:
    with token_file(Control("127.0.0.1:50052", OURS.token)):
        path = home / ".halfmoon" / "50052.token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert find_control("localhost:50052").credentials == OURS
        with pytest.raises(ConfigError, match="no token of the cluster at localhost:50053"):
            find_control("localhost:50053")
    assert not path.exists()


def test_a_file_that_is_left_is_replaced_and_a_link_is_not_written_through(home: Path) -> None:
    (home / ".halfmoon").mkdir()
    victim = home / "victim"
    victim.write_text("precious")
    (home / ".halfmoon" / "50052.token").symlink_to(victim)
    with token_file(Control("127.0.0.1:50052", OURS.token)):
        assert find_control("127.0.0.1:50052").credentials == OURS
    assert victim.read_text() == "precious"


def test_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Credentials.make()
    monkeypatch.setenv(VARIABLE, other.token)
    with token_file(Control("127.0.0.1:50052", OURS.token)):
        assert find_control("127.0.0.1:50052").credentials == other


def test_a_home_that_cannot_be_written_is_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / ".halfmoon").write_text("a file in the way")
    with token_file(Control("127.0.0.1:50052", OURS.token)):
        assert "cannot write" in caplog.text and VARIABLE in caplog.text and OURS.token not in caplog.text
