"""Files that stand in both workers' rooms are the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

import halfmoon.decode_worker
import halfmoon.prefill_worker


@pytest.mark.parametrize("name", ["store_link.py", "transfer.py"])
def test_what_both_rooms_hold_is_the_same_in_both(name: str) -> None:
    here, there = (Path(room.__file__ or "").parent / name for room in (halfmoon.decode_worker, halfmoon.prefill_worker))
    assert here.read_text() == there.read_text()
