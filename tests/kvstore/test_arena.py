from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfmoon.kvstore.arena import DATA_OFFSET, Arena, open_arena, remove_abandoned
from halfmoon.protocol.errors import ConfigError


def test_what_one_side_writes_the_other_reads(tmp_path: Path) -> None:
    arena = Arena(1000, tmp_path)
    owner = arena.format(num_layers=3, layer_bytes=100)
    client = open_arena(str(arena.path), arena.token, 3, 3, 100)
    assert owner.num_slots == client.num_slots == 3
    for slot in range(3):
        for layer in range(3):
            client.row(slot, layer)[:] = slot * 3 + layer
    assert [int(owner.row(slot, layer)[99]) for slot in range(3) for layer in range(3)] == list(range(9))
    assert arena.path.read_bytes()[:32] == arena.token
    assert arena.path.read_bytes()[DATA_OFFSET + 100] == 1
    assert arena.path.stat().st_mode & 0o077 == 0
    arena.close()
    arena.close()
    assert not arena.path.exists() and client.row(2, 2)[0] == 8


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    arena = Arena(1000, tmp_path)
    rows = arena.format(3, 100)
    for slot, layer in [(3, 0), (0, 3), (-1, 0), (0, -1)]:
        with pytest.raises(IndexError, match="3 slots of 3 layers"):
            rows.row(slot, layer)
    arena.close()


def test_a_client_maps_no_other_arena(tmp_path: Path) -> None:
    arena, other = Arena(1000, tmp_path), Arena(1000, tmp_path)
    arena.format(3, 100)
    other.format(3, 100)
    with pytest.raises(ValueError, match="another store's"):
        open_arena(str(other.path), arena.token, 3, 3, 100)
    with pytest.raises(ValueError, match="its store said otherwise"):
        open_arena(str(arena.path), arena.token, 3, 3, 50)
    with pytest.raises(OSError):
        open_arena(str(tmp_path / "none"), arena.token, 3, 3, 100)
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(ValueError, match="no arena"):
        open_arena(str(tmp_path / "short"), arena.token, 3, 3, 100)
    arena.close()
    other.close()


def test_an_arena_too_small_for_a_block_says_so(tmp_path: Path) -> None:
    arena = Arena(1000, tmp_path)
    with pytest.raises(ConfigError, match=r"store.arena_bytes is 1000; one KV block takes 1200 bytes"):
        arena.format(3, 400)
    arena.close()


def test_an_arena_too_large_for_its_folder_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lower store.arena_bytes"):
        Arena(2**50, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_arenas_of_killed_owners_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    living = Arena(1000, tmp_path)
    script = (
        "import os, signal, sys, pathlib; from halfmoon.kvstore.arena import Arena; "
        "Arena(1000, pathlib.Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False)
    assert len(list(tmp_path.iterdir())) == 2
    (abandoned,) = remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [living.path] and abandoned != living.path
    living.close()


def test_an_arena_that_was_taken_for_abandoned_while_it_was_created_is_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def remove_then_lock(handle: int, how: int) -> None:
        """As another store's clean-up that comes between open and flock."""
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    arena = Arena(1000, tmp_path)
    assert list(tmp_path.iterdir()) == [arena.path] != removed
    arena.close()


def test_rows_of_neighbouring_slots_are_one_strided_view(tmp_path: Path) -> None:
    arena = Arena(3000, tmp_path)
    mapped = arena.format(3, 100)
    for slot in range(10):
        mapped.row(slot, 2)[:] = slot
    rows = mapped.rows([4, 5, 6, 9, 2, 1], 2)
    assert [run.shape for run in rows.runs] == [(3, 100), (1, 100), (1, 100), (1, 100)] and len(rows) == 6
    assert [int(row[99]) for row in rows] == [4, 5, 6, 9, 2, 1] and int(rows[3][0]) == 9
    rows.runs[0][1] = 77
    assert (mapped.row(5, 2) == 77).all() and (mapped.row(5, 1) == 0).all()
    assert len(mapped.rows([], 0)) == 0
    for slots, layer in (([9, 10], 0), ([-1, 0], 0), ([0], 3)):
        with pytest.raises(IndexError, match="10 slots of 3 layers"):
            mapped.rows(slots, layer)
    arena.close()
