"""Server-sent events from bytes that were cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.deploy.load.sse import EventParser

STREAM = 'data: {"text": "é😀"}\n\n: a comment\ndata:{"a": 1}\r\n\r\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'.encode()
EVENTS = ['{"text": "é😀"}'.encode(), b'{"a": 1}', b"one\ntwo", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    found = [event for start, end in pairwise(edges) for event in parser.feed(STREAM[start:end])]
    assert found == EVENTS


def test_an_event_is_given_with_the_byte_that_ends_it_and_not_later() -> None:
    parser = EventParser()
    assert [len(parser.feed(STREAM[at : at + 1])) for at in range(len(EVENTS[0]) + 8)] == [0] * (len(EVENTS[0]) + 7) + [1]


def test_what_is_no_event_stream_is_refused_before_it_fills_the_memory() -> None:
    from halfmoon.deploy.load import sse
    from halfmoon.protocol.errors import InvalidRequest

    parser = EventParser()
    with pytest.raises(InvalidRequest, match="event stream"):
        for _ in range(sse.MAX_EVENT_BYTES // 2**20 + 2):
            parser.feed(b"x" * 2**20)
