"""What a face holds of a request: its tokens as they come, and the two ways to end it early.

async for event in stream:  Tokens ... Finished            stop(): done, keep the cache            cancel(): free everything
Leaving it in any way (aclose, a cancelled task, the garbage collector) is a cancel.
"""

from __future__ import annotations

import asyncio

from ...protocol.v1 import common_pb2
from ..request import Finished, RequestState, TokenEvent, Tokens
from .runner import RequestRunner


class TokenStream:
    """One consumer. Not thread-safe: it belongs to the event loop that opened it."""

    def __init__(self, runner: RequestRunner) -> None:
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._num_taken_tokens = 0

    @property
    def request_id(self) -> str:
        return self._runner.request.request_id

    @property
    def state(self) -> RequestState:
        return self._runner.state

    @property
    def phases(self) -> common_pb2.PhaseRecord:
        """As far as the request has come; whole once Finished was given."""
        return self._runner.clock.record

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        """Raises the HalfmoonError that ended the request, after every token that came before it."""
        runner = self._runner
        while not runner.events:
            if runner.error is not None:
                raise runner.error
            if runner.is_over:
                raise StopAsyncIteration
            runner.news.clear()
            try:
                await runner.news.wait()
            except asyncio.CancelledError:
                runner.cancel("the client left the stream")
                raise
        event = runner.events.popleft()
        if isinstance(event, Tokens):
            self._num_taken_tokens += len(event.tokens)
        return event

    async def stop(self) -> Finished:
        """A stop string was found: the request ends as DONE/stop, decode keeps its blocks for the next turn.

        Usage counts the tokens that were taken from the stream. Returns within a few seconds even where decode does not
        answer. Raises the HalfmoonError of a request that had failed before.
        """
        try:
            return await self._runner.stop(self._num_taken_tokens)
        except asyncio.CancelledError:
            self._runner.cancel("the client left the stream")
            raise

    async def cancel(self, reason: str) -> None:
        """Frees prefill, store and decode at once. A request that is over stays as it ended."""
        self._runner.cancel(reason)

    async def aclose(self) -> None:
        self._runner.cancel("the client left the stream")

    def __del__(self) -> None:
        runner = self._runner
        if not runner.is_over and not self._loop.is_closed():
            # the collector may run in any thread
            self._loop.call_soon_threadsafe(runner.cancel, "the client left the stream")
