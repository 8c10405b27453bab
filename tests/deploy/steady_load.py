"""Requests without a pause, of which none may fail. `from halfmoon.tests.deploy.steady_load import steady_load`"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from halfmoon.client import AsyncClient, Completion

Prompt = tuple[int, ...]
HANGS_AFTER_S = 120.0


@dataclass
class SteadyLoad:
    address: str  # of HTTP
    client: AsyncClient
    api_key: str
    trusted: ssl.SSLContext
    num_begun: int = 0
    ended: list[int] = field(default_factory=list)  # by their number
    grew: asyncio.Condition = field(default_factory=asyncio.Condition)
    is_over: bool = False

    async def more(self, num: int) -> None:
        """Until so many have ended that began after this call."""
        mark = self.num_begun
        async with asyncio.timeout(HANGS_AFTER_S), self.grew:
            await self.grew.wait_for(lambda: sum(number >= mark for number in self.ended) >= num)

    async def over_grpc(self, prompt: Prompt, right: Completion) -> None:
        """One after the other, on one connection."""
        while not self.is_over:
            number = self._begin()
            found = await self.client.generate(token_ids=list(prompt), max_tokens=len(right.token_ids), temperature=0.0, ignore_eos=True)
            assert found.token_ids == right.token_ids
            await self._end(number)

    async def over_http(self, prompt: Prompt, right: Completion) -> None:
        """Each on a connection of its own."""
        body = {"prompt": list(prompt), "max_tokens": len(right.token_ids), "temperature": 0, "ignore_eos": True, "stream": True}
        while not self.is_over:
            number, text = self._begin(), ""
            async with (
                httpx.AsyncClient(verify=self.trusted, headers={"authorization": f"Bearer {self.api_key}"}, timeout=120) as http,
                http.stream("POST", f"https://{self.address}/v1/completions", json=body) as reply,
            ):
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            assert text == right.text
            await self._end(number)

    def _begin(self) -> int:
        self.num_begun += 1
        return self.num_begun - 1

    async def _end(self, number: int) -> None:
        self.ended.append(number)
        async with self.grew:
            self.grew.notify_all()


@asynccontextmanager
async def steady_load(cluster: Any, authority: bytes, answers: Mapping[Prompt, Completion]) -> AsyncIterator[SteadyLoad]:
    """At a cluster's clients' ports, by TLS, until it is left. Raises an ExceptionGroup of whatever failed or was not as in answers.

    authority: PEM that clients trust.
    """
    trusted = ssl.create_default_context(cadata=authority.decode())
    async with AsyncClient(cluster.supervisor.grpc_address, api_key=cluster.api_key, authority=authority) as client:
        load = SteadyLoad(cluster.supervisor.http_address, client, cluster.api_key, trusted)
        async with asyncio.TaskGroup() as group:
            for prompt, right in answers.items():
                group.create_task(load.over_grpc(prompt, right))
                group.create_task(load.over_http(prompt, right))
            yield load
            load.is_over = True
