"""protocol/watched_files.py, protocol/front_tls.py: files that change, and files that are no good."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from halfmoon.deploy.certificates import init, rotate
from halfmoon.protocol import watched_files
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.front_tls import FrontCertificate
from halfmoon.protocol.watched_files import WatchedFiles


class Read:
    """What a watch has read so far; "half" can't be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[str] = []
        self.again = asyncio.Event()
        self.watch = WatchedFiles("words", [path], self._renew)

    async def _renew(self) -> None:
        text = self.path.read_text() if self.path.exists() else "half"
        if text == "half":
            raise ConfigError(f"{self.path.name} is half a word")
        self.taken.append(text)
        self.again.set()


async def test_files_are_read_when_they_change_and_a_bad_one_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = Read(tmp_path / "word")
    read.path.write_text("one")
    await read.watch.look()
    await read.watch.look()
    assert read.taken == ["one"]
    read.path.write_text("half")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await read.watch.look()
        read.path.unlink()
        await read.watch.look()
    assert [record.getMessage() for record in caplog.records] == ["words stay as they were: word is half a word"]
    read.path.write_text("two")
    await read.watch.look()
    assert read.taken == ["one", "two"]
    new = tmp_path / "new"
    new.write_text("2.0")
    new.replace(read.path)  # another inode, as many bytes
    await read.watch.look()
    assert read.taken == ["one", "two", "2.0"]


async def test_a_bad_file_is_read_again_although_its_time_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Read(tmp_path / "word")
    monkeypatch.setattr(watched_files, "_time_of", lambda path: (1, 1, 1))
    await read.watch.look()
    read.path.write_text("whole")
    await read.watch.look()
    assert read.taken == ["whole"]


async def test_it_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_INTERVAL_S", 0.001)
    read = Read(tmp_path / "word")
    read.path.write_text("one")
    running = asyncio.create_task(read.watch.run())
    async with asyncio.timeout(60):
        await read.again.wait()
        read.again.clear()
        read.path.write_text("three")
        await read.again.wait()
    running.cancel()
    assert read.taken == ["one", "three"]


def test_the_front_takes_no_pair_that_does_not_fit_or_has_expired(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    init(folder, [], 1)
    front = FrontCertificate(folder / "front.pem", folder / "front.key")
    before, key = front.now, (folder / "front.key").read_bytes()
    rotate(folder, [], 1)
    assert front.read() != before and front.now == before, "who read it decides when it counts"
    (folder / "front.key").write_bytes(key)
    with pytest.raises(ConfigError, match="can't be used"):
        front.read()
    (folder / "front.key").write_bytes(b"")
    with pytest.raises(ConfigError, match="no PEM file"):
        front.read()
    rotate(folder, [], 0)
    with pytest.raises(ConfigError, match="expired"):
        front.read()
    with pytest.raises(ConfigError, match="can't be used"):
        (folder / "front.pem").write_bytes((folder / "front.pem").read_bytes()[:200])
        front.read()
