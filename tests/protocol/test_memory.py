from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.protocol.memory import available_bytes, human_bytes


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    return tmp_path / "meminfo"


def test_what_the_machine_has_counts_where_nothing_limits_it(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_bytes(meminfo, tmp_path) == 1000 * 1024


def test_a_container_s_limit_counts_less_what_it_uses_and_could_not_give_back(meminfo: Path, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("450000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert available_bytes(meminfo, tmp_path) == 150_000


@pytest.mark.parametrize(("num_bytes", "words"), [(512, "512 bytes"), (1500, "1.5 kB"), (16_060_522_904, "16.1 GB"), (2e12, "2.0 TB")])
def test_sizes_are_read_in_their_unit(num_bytes: float, words: str) -> None:
    assert human_bytes(num_bytes) == words
