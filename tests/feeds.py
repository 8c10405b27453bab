"""Token feeds of workers whose answers are a script. `from halfmoon.tests.feeds import Feeds`"""

from __future__ import annotations

import asyncio
from typing import Any

from halfmoon.protocol.v1 import common_pb2, worker_pb2


class Feeds:
    """The token feeds of scripted workers: each token is a message of its own."""

    def __init__(self) -> None:
        self._steps: dict[str, asyncio.Queue[worker_pb2.StepTokens | None]] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def serve(self, request: worker_pb2.TokensRequest, context: Any) -> None:
        steps = self._steps[request.feed_id] = asyncio.Queue()
        await context.write(worker_pb2.StepTokens())
        while (step := await steps.get()) is not None:
            await self._flowing.wait()
            await context.write(step)

    def give(self, request: worker_pb2.DecodeRequest, token: common_pb2.TokenOutput) -> None:
        assert request.feed_id and request.call
        step = worker_pb2.StepTokens()
        if token.HasField("logprob"):
            step.outputs.add(call=request.call, token=token)
        else:
            step.calls.append(request.call)
            step.token_ids.append(token.token_id)
        self._steps[request.feed_id].put_nowait(step)

    def end(self) -> None:
        for steps in self._steps.values():
            steps.put_nowait(None)

    def hold(self) -> None:
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()
