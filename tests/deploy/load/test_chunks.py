"""Which chunks are a token's arrival, and when."""

from __future__ import annotations

import json
from typing import Any

from halfmoon.deploy.load.chunks import DONE, ChunkReader
from halfmoon.deploy.load.sample import Sample


def read(*chunks: dict[str, Any]) -> Sample:
    """Chunk number n is read at n seconds."""
    found = Sample(0, "r", 0, 0.0, 0.0, 8, 4)
    reader = ChunkReader(found)
    for now, chunk in enumerate(chunks):
        reader.take(json.dumps(chunk).encode(), float(now))
    reader.take(DONE, float(len(chunks)))
    return found


def text(value: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": value, "finish_reason": reason}]}


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": reason}]}


def usage(num_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 6}}}


def test_a_chats_opening_chunk_brings_no_token() -> None:
    found = read(delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"), usage(2))
    assert found.arrivals_s == [1.0, 2.0] and found.finish_reason == "stop"


def test_reasoning_and_tool_calls_are_tokens() -> None:
    assert read(delta(reasoning_content="hm"), delta(tool_calls=[{"index": 0}]), delta(content="a"), usage(3)).arrivals_s == [0, 1, 2]


def test_a_chunk_without_text_is_a_token_that_has_none_yet() -> None:
    assert read(text(""), text("é"), text("!", "length"), usage(3)).arrivals_s == [0.0, 1.0, 2.0]


def test_the_chunk_that_only_says_why_is_no_token_however_late_it_comes() -> None:
    found = read(text("a"), text("b"), text("", "stop"), usage(3))
    assert found.arrivals_s == [0.0, 1.0] and sorted(found.gaps_s) == [0.0, 1.0]


def test_counts_and_halfmoons_phases_are_the_servers() -> None:
    found = read(text("a"), text("", "length") | {"halfmoon": {"phases": [{"index": 0, "prefill_s": 0.5}]}}, usage(1))
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (8, 1, 6)
    assert found.phases == {"index": 0, "prefill_s": 0.5}


def test_usage_in_every_chunk_counts_up() -> None:
    found = read(text("a b c") | {"usage": usage(3)["usage"]}, text("d", "length") | {"usage": usage(4)["usage"]})
    assert found.num_tokens == 4 and sorted(found.gaps_s) == [0.0, 0.0, 1.0]


def test_an_error_in_the_stream_is_kept_with_its_code() -> None:
    assert read(text("a"), {"error": {"message": "the engine fell over", "code": "oops"}}).error == "oops: the engine fell over"
