"""Token feeds: one stream to each proxy with the tokens of all its calls, one message for each step.

job ── add(call, token) ─► TokenFeed.unsent ── next_step ─► StepTokens ─► Tokens stream ─► proxy
                             └─ tokens that come while a message is written go into the next one; too many of them end the feed
"""

from __future__ import annotations

import asyncio

from ..protocol.errors import InvalidRequest, Unavailable
from ..protocol.v1 import common_pb2, worker_pb2

MAX_UNSENT_TOKENS = 2**20  # about 8 MiB; a proxy that is minutes behind the engine will not catch up


class TokenFeed:
    """Belongs to the event loop that serves it."""

    def __init__(self, feed_id: str) -> None:
        self.feed_id = feed_id
        self.ended = False  # True once nobody reads it any more
        self._num_calls = 0
        self._draining = False
        self._error: Unavailable | None = None
        self._changed = asyncio.Event()
        self._calls: list[int] = []
        self._token_ids: list[int] = []
        self._outputs: list[worker_pb2.StepTokens.Output] = []

    def enter(self) -> None:
        """One more call sends its tokens here, until leave()."""
        self._num_calls += 1

    def leave(self) -> None:
        self._num_calls -= 1
        self._changed.set()

    def add(self, call: int, token: common_pb2.TokenOutput) -> None:
        if self.ended or self._error is not None:
            return
        if token.HasField("logprob"):
            self._outputs.append(worker_pb2.StepTokens.Output(call=call, token=token))
        else:
            self._calls.append(call)
            self._token_ids.append(token.token_id)
        if len(self._calls) + len(self._outputs) > MAX_UNSENT_TOKENS:
            self._error = Unavailable(f"the proxy reads its token feed too slowly: {MAX_UNSENT_TOKENS} tokens wait to be sent")
            self._calls, self._token_ids, self._outputs = [], [], []
        self._changed.set()  # the reader runs after the step's last token

    def drain(self) -> None:
        """From now on the feed ends with its last call."""
        self._draining = True
        self._changed.set()

    async def next_step(self) -> worker_pb2.StepTokens | None:
        """All waiting tokens, or None at the end of a draining feed. Raises Unavailable if too many waited."""
        while not (self._calls or self._outputs):
            if self._error is not None:
                raise self._error
            if self._draining and self._num_calls == 0:
                return None
            self._changed.clear()
            await self._changed.wait()
        step = worker_pb2.StepTokens(calls=self._calls, token_ids=self._token_ids, outputs=self._outputs)
        self._calls, self._token_ids, self._outputs = [], [], []
        return step


class TokenFeeds:
    """The open feeds, by the ids that their proxies gave them."""

    def __init__(self) -> None:
        self._feeds: dict[str, TokenFeed] = {}
        self._draining = False

    def open(self, feed_id: str) -> TokenFeed:
        """Opens a feed, until close(). Raises InvalidRequest for an id that is missing or taken."""
        if not feed_id or feed_id in self._feeds:
            raise InvalidRequest(f"a token feed's id must be new and not empty; got {feed_id!r}", param="feed_id")
        feed = self._feeds[feed_id] = TokenFeed(feed_id)
        if self._draining:
            feed.drain()
        return feed

    def close(self, feed: TokenFeed) -> None:
        feed.ended = True
        del self._feeds[feed.feed_id]

    def enter(self, request: worker_pb2.DecodeRequest) -> TokenFeed | None:
        """The feed of a new call, or None if its tokens go into its own stream. Raises Unavailable if the feed is not open."""
        if not request.feed_id:
            return None
        feed = self._feeds.get(request.feed_id)
        if feed is None:
            raise Unavailable(f"the token feed {request.feed_id} is not open, or has ended; open one with Tokens first")
        feed.enter()
        return feed

    def drain(self) -> None:
        """Each feed ends with its last call, so that a stopping server does not wait for the streams."""
        self._draining = True
        for feed in self._feeds.values():
            feed.drain()
