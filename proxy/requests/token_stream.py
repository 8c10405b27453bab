"""A face's handle on a request: its tokens as they come, and the two ways to end it early.

async for event in stream:  Tokens ... Finished            stop(): done, keep the cache            cancel(): free everything
or, for many streams at once: listen(on_news), then take()
Leaving it in any way (aclose, a cancelled task, the garbage collector) cancels the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...protocol.v1 import common_pb2
from ..request import Finished, RequestState, TokenEvent, Tokens
from .runner import RequestRunner

LEFT = "the client left the stream"


class TokenStream:
    """One consumer. Not thread-safe: it belongs to the event loop that opened it."""

    def __init__(self, runner: RequestRunner) -> None:
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._num_taken_tokens = self._num_written_tokens = 0
        self._news = asyncio.Event()
        runner.on_news = self._news.set

    @property
    def request_id(self) -> str:
        return self._runner.request.request_id

    @property
    def state(self) -> RequestState:
        return self._runner.state

    @property
    def is_over(self) -> bool:
        """The request has ended. Events from before its end may still be waiting."""
        return self._runner.is_over

    @property
    def phases(self) -> common_pb2.PhaseRecord:
        """Filled in as the request goes on; complete once Finished has been given."""
        return self._runner.clock.record

    @property
    def prompt_logprobs(self) -> list[common_pb2.PromptLogprobs]:
        """In the prompt's order; all of them once the first event has been given, none where they were not asked for."""
        return self._runner.prompt_logprobs

    def listen(self, on_news: Callable[[], None]) -> None:
        """on_news is called whenever take() has something to return or raise. It takes the place of the iterator.

        It must not hold this stream, or the stream could never be garbage-collected.
        """
        self._runner.on_news = on_news

    def take(self) -> list[TokenEvent]:
        """The events since the last call. Raises the HalfmoonError that ended the request, once all tokens before it are taken."""
        runner = self._runner
        if not runner.events:
            if runner.error is not None:
                raise runner.error
            return []
        events = list(runner.events)
        runner.events.clear()
        for event in events:
            self._taken(event)
        return events

    def wrote(self) -> None:
        """What was taken so far has been written to the client: its times count from now."""
        num_tokens = self._num_taken_tokens - self._num_written_tokens
        if num_tokens and not self._runner.is_settled:
            self._num_written_tokens = self._num_taken_tokens
            self._runner.clock.wrote(num_tokens)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        """Raises as take does. Who asks for the next event has written those before it."""
        runner = self._runner
        self.wrote()
        while not runner.events:
            if runner.error is not None:
                raise runner.error
            if runner.is_over:
                raise StopAsyncIteration
            await self._wait()
        event = runner.events.popleft()
        self._taken(event)
        return event

    def stop_soon(self, num_used_tokens: int) -> None:
        """A stop string was found: the request ends as DONE/stop, decode keeps its blocks for the next turn.

        Finished is the next event, within a few seconds even if decode does not answer. num_used_tokens: how many of the tokens
        that came were used; usage counts these.
        """
        self._runner.stop(num_used_tokens)

    async def stop(self) -> Finished:
        """As stop_soon, with all tokens that the iterator gave, and waits for the end. If the request had failed, raises its error."""
        runner = self._runner
        runner.stop(self._num_taken_tokens)
        while not runner.is_over:
            await self._wait()
        if runner.finished is None:
            assert runner.error is not None
            raise runner.error
        self._settle()
        return runner.finished

    async def cancel(self, reason: str) -> None:
        """Frees prefill, store and decode at once. A request that is over stays as it ended."""
        self._runner.cancel(reason)

    def abandon(self, reason: str) -> None:
        """As cancel, for callers that are not coroutines."""
        self._runner.cancel(reason)

    async def aclose(self) -> None:
        self._runner.cancel(LEFT)

    def _taken(self, event: TokenEvent) -> None:
        if isinstance(event, Tokens):
            self._num_taken_tokens += len(event.token_ids)
        else:
            self._settle()

    def _settle(self) -> None:
        self._runner.settle(self._num_taken_tokens - self._num_written_tokens)

    async def _wait(self) -> None:
        self._news.clear()
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            self._runner.cancel(LEFT)
            raise

    def __del__(self) -> None:
        runner = self._runner
        if not runner.is_settled and not self._loop.is_closed():
            # the collector may run in any thread
            self._loop.call_soon_threadsafe(runner.cancel, LEFT)
