"""decode_worker/token_feed.py: a message a step for all calls of a proxy, whatever its pace."""

from __future__ import annotations

import asyncio

import pytest

from halfmoon.decode_worker import token_feed
from halfmoon.decode_worker.token_feed import TokenFeed, TokenFeeds
from halfmoon.protocol.errors import InvalidRequest, Unavailable
from halfmoon.protocol.v1 import common_pb2, worker_pb2


def token(token_id: int, logprob: float | None = None) -> common_pb2.TokenOutput:
    return common_pb2.TokenOutput(token_id=token_id, logprob=logprob)


def pairs(step: worker_pb2.StepTokens | None) -> list[tuple[int, int]]:
    assert step is not None
    return list(zip(step.calls, step.token_ids, strict=True))


def request(feed_id: str) -> worker_pb2.DecodeRequest:
    return worker_pb2.DecodeRequest(feed_id=feed_id, call=1)


async def test_the_tokens_of_a_step_are_one_message() -> None:
    feed = TokenFeed("f")
    reader = asyncio.ensure_future(feed.next_step())
    await asyncio.sleep(0)
    feed.add(1, token(10))
    feed.add(2, token(20))
    assert pairs(await reader) == [(1, 10), (2, 20)]


async def test_what_comes_while_a_message_is_written_goes_together_and_in_order() -> None:
    feed = TokenFeed("f")
    for call, token_id in ((1, 10), (2, 20), (1, 11)):
        feed.add(call, token(token_id))
    assert pairs(await feed.next_step()) == [(1, 10), (2, 20), (1, 11)]


async def test_logprobs_come_as_they_are_and_only_where_they_were_asked_for() -> None:
    feed, asked = TokenFeed("f"), token(10, -0.5)
    feed.add(1, asked)
    feed.add(2, token(20))
    step = await feed.next_step()
    assert pairs(step) == [(2, 20)] and step is not None
    assert [(output.call, output.token) for output in step.outputs] == [(1, asked)]


async def test_a_proxy_that_does_not_read_loses_its_feed_and_not_the_workers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_feed, "MAX_UNSENT_TOKENS", 3)
    feed = TokenFeed("f")
    for token_id in range(1000):
        feed.add(1, token(token_id))
    with pytest.raises(Unavailable, match="too slowly: 3 tokens"):
        await feed.next_step()
    assert feed._token_ids == []


async def test_a_feed_that_drains_ends_with_its_last_call_and_loses_no_token() -> None:
    feeds = TokenFeeds()
    feed = feeds.open("f")
    assert feeds.enter(request("f")) is feed
    feeds.drain()
    reader = asyncio.ensure_future(feed.next_step())
    await asyncio.sleep(0)
    assert not reader.done()
    feed.add(1, token(10))
    feed.leave()
    assert pairs(await reader) == [(1, 10)]
    assert await feed.next_step() is None
    assert await feeds.open("late").next_step() is None


async def test_a_call_for_a_feed_that_is_not_open_is_refused() -> None:
    feeds = TokenFeeds()
    assert feeds.enter(worker_pb2.DecodeRequest()) is None
    with pytest.raises(Unavailable, match="not open"):
        feeds.enter(request("f"))
    feeds.close(feeds.open("f"))
    with pytest.raises(Unavailable, match="not open"):
        feeds.enter(request("f"))


async def test_a_feed_that_nobody_reads_any_more_takes_nothing() -> None:
    feeds = TokenFeeds()
    feed = feeds.open("f")
    feeds.close(feed)
    feed.add(1, token(10))
    assert feed._token_ids == []


@pytest.mark.parametrize("feed_id", ["", "f"])
async def test_a_feeds_id_must_be_new(feed_id: str) -> None:
    feeds = TokenFeeds()
    feeds.open("f")
    with pytest.raises(InvalidRequest, match="new and not empty"):
        feeds.open(feed_id)
