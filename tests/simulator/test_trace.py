from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from halfmoon.protocol.errors import ConfigError
from halfmoon.simulator.replay import ReplayOptions, replay, sessions
from halfmoon.simulator.trace import Trace, TraceRequest, ideal_hits, read_trace

LINES = [
    {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 1024, "output_length": 7, "hash_ids": [0, 2]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 9, "hash_ids": [0, 2, 3]},
]


def write(path: Path, lines: list[dict[str, object]]) -> Path:
    text = "\n".join(json.dumps(line) for line in lines).encode()
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)
    return path


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.jsonl.xz"])
def test_a_trace_is_read_by_arrival_plain_or_compressed(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path / name, LINES))
    assert trace.name == "talk"
    assert [request.arrival_s for request in trace.requests] == [0.0, 3.0, 3.0]
    assert trace.requests[0] == TraceRequest(0.0, 1024, 7, (0, 2))
    assert trace.requests[2].full_blocks == (0, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"input_length": 0}, "at least 1"), ({"hash_ids": [0]}, "hash id"), ({"output_length": "x"}, "'<'|not supported|x")],
)
def test_a_line_that_is_no_request_is_named_by_its_number(tmp_path: Path, change: dict[str, object], told: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=told) as caught:
        read_trace(write(tmp_path / "bad.jsonl", [LINES[0], LINES[1] | change]))
    if isinstance(caught.value, ConfigError):
        assert "bad.jsonl:2" in caught.value.message


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no request"):
        read_trace(write(tmp_path / "empty.jsonl", []))


def test_the_ceiling_of_three_requests_is_counted_by_hand(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "talk.jsonl", LINES))
    # block 0, then 0, then 0 and 2: three hits of seven blocks; arrival order breaks the tie as the file has it
    ceiling = ideal_hits(trace.requests)
    assert ceiling.blocks_ratio == pytest.approx(3 / 7)
    assert ceiling.tokens_ratio == pytest.approx(3 * 512 / (1024 + 700 + 1500))


def growing(num_sessions: int, turns: int) -> Trace:
    """Sessions that share a system prompt (block 0) and nothing else."""
    found: list[TraceRequest] = []
    for turn in range(turns):
        for name in range(num_sessions):
            blocks = (0, *(1000 * (name + 1) + number for number in range(turn + 1)))
            found.append(TraceRequest(3.0 * turn, 512 * len(blocks), 10, blocks))
    return Trace("growing", "", tuple(found))


def test_a_session_is_what_shares_more_than_the_system_prompt() -> None:
    trace = growing(20, 4)
    names = sessions(trace.requests)
    assert len(set(names)) == 20
    assert names == [request.block_ids[1] for request in trace.requests]


def test_sampling_keeps_whole_sessions_and_so_the_ceiling() -> None:
    trace = growing(200, 5)
    half = replay(trace, ReplayOptions(sample=0.5, seed=3)).requests
    assert 60 < len(half) / 5 < 140
    assert all(sum(one.block_ids[1] == other.block_ids[1] for other in half) == 5 for one in half[::50])
    assert ideal_hits(half).blocks_ratio == pytest.approx(ideal_hits(trace.requests).blocks_ratio, abs=0.01)


def test_speed_divides_arrivals_and_dequantising_spreads_them_inside_a_tick() -> None:
    trace = growing(50, 4)
    fast = replay(trace, ReplayOptions(speed=2.0)).requests
    assert [request.arrival_s for request in fast] == [request.arrival_s / 2 for request in trace.requests]
    spread = replay(trace, ReplayOptions(dequantise=True, seed=1)).requests
    moments = [request.arrival_s for request in spread]
    assert moments == sorted(moments) and len(set(moments)) == len(moments)
    again = replay(trace, ReplayOptions(dequantise=True, seed=1)).requests
    assert spread == again != replay(trace, ReplayOptions(dequantise=True, seed=2)).requests


def test_a_window_starts_at_zero_and_what_came_before_warms() -> None:
    trace = growing(10, 6)
    found = replay(trace, ReplayOptions(start_s=9.0, duration_s=6.0, warm_s=6.0))
    assert [request.arrival_s for request in found.requests] == [0.0] * 10 + [3.0] * 10
    assert {request.arrival_s for request in found.warm} == {3.0, 6.0}


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="speed"):
        ReplayOptions(speed=0.0)
    with pytest.raises(ConfigError, match="sample"):
        ReplayOptions(sample=1.5)
