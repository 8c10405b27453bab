"""proxy/members/token_feed.py, and what an attempt makes of its two streams, over real gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.protocol.errors import HalfmoonError, WorkerLost
from halfmoon.protocol.v1 import common_pb2, worker_pb2
from halfmoon.proxy.members.token_feed import FeedCall
from halfmoon.tests.waiting import within


class Sink:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[common_pb2.TokenOutput] = []
        self.error: HalfmoonError | None = None
        self.news = asyncio.Event()

    def on_tokens(self, token_ids: list[int], outputs: list[common_pb2.TokenOutput]) -> None:
        self.token_ids += token_ids
        self.outputs += outputs
        self.news.set()

    def on_feed_lost(self, error: HalfmoonError) -> None:
        self.error = error
        self.news.set()


def give(peer: Any, call: FeedCall, token_id: int, logprob: float | None = None) -> None:
    token = common_pb2.TokenOutput(token_id=token_id, logprob=logprob)
    peer.feeds.give(worker_pb2.DecodeRequest(feed_id=call.feed_id, call=call.number), token)


async def test_each_call_gets_its_own_tokens_and_one_that_left_gets_none(bench: Any) -> None:
    peer, feed = bench.decodes[0], bench.cluster.members["decode-0"].token_feed
    first, second, third = Sink(), Sink(), Sink()
    calls = [await within(2, feed.enter(sink)) for sink in (first, second, third)]
    assert len({call.number for call in calls}) == 3 and len({call.feed_id for call in calls}) == 1
    feed.leave(calls[0])
    give(peer, calls[0], 10)
    give(peer, calls[1], 20)
    give(peer, calls[2], 30, -0.5)
    await within(2, third.news.wait())
    assert (first.token_ids, second.token_ids, third.token_ids) == ([], [20], [30])
    assert second.outputs == [] and [token.logprob for token in third.outputs] == [-0.5]


async def test_the_end_of_a_feed_is_the_loss_of_the_worker_and_the_next_call_opens_another(bench: Any) -> None:
    peer, feed = bench.decodes[0], bench.cluster.members["decode-0"].token_feed
    sink, late = Sink(), Sink()
    call = await within(2, feed.enter(sink))
    peer.feeds.end()
    await within(2, sink.news.wait())
    assert isinstance(sink.error, WorkerLost) and "decode worker decode-0" in sink.error.message
    again = await within(2, feed.enter(late))
    assert again.feed_id != call.feed_id and again.number != call.number
    feed.leave(call)  # of the feed before: nothing to do
    give(peer, again, 40)
    await within(2, late.news.wait())
    assert late.token_ids == [40]


async def test_a_request_is_replayed_with_exactly_the_sent_tokens_when_its_feed_ends(make_bench: Any, peers: Any) -> None:
    bench = await make_bench(1, 2)
    losing, reached = bench.decodes[0], asyncio.Event()

    async def stand_still(index: int) -> None:
        if index == 3:
            reached.set()
            await peers.forever()

    losing.before_token = stand_still
    request = bench.request()
    stream = bench.router.open(request)
    first = await within(2, peers.take(stream, 3))
    await within(2, reached.wait())
    losing.feeds.end()
    rest, finished = await within(2, peers.read(stream))
    assert first + rest == peers.answer(request)
    assert (finished.phases.num_attempts, finished.phases.decode_worker) == (2, "decode-1")
    assert bench.sample("halfmoon_request_replays_total", reason="worker_lost") == 1
    await within(2, losing.cancelled.wait())
    bench.assert_at_rest()


@pytest.mark.parametrize("late", ["tokens", "admission"])
async def test_the_order_of_the_two_streams_does_not_matter(late: str, bench: Any, peers: Any) -> None:
    """The worker's calls are not ordered among themselves: Finished may overtake tokens, and tokens the admission."""
    peer, request = bench.decodes[0], bench.request()
    if late == "tokens":
        peer.feeds.hold()
    else:
        peer.tokens_first = True
    stream = bench.router.open(request)
    if late == "tokens":
        await within(2, peers.take(stream, 1))
        await within(2, peer.finished.wait())
        assert bench.router.num_running == 1, "it has not got all its tokens"
        peer.feeds.release()
        rest, finished = await within(2, peers.read(stream))
        assert rest == peers.answer(request)[1:]
    else:
        token_ids, finished = await within(2, peers.read(stream))
        assert token_ids == peers.answer(request)
    assert finished.usage.num_completion_tokens == 6 and finished.phases.num_attempts == 1
    bench.assert_at_rest()
