"""A fake OpenAI server and a client's session for the folder's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from halfmoon.deploy.load.plan import LoadRequest, block_keys
from halfmoon.deploy.load.sender import Sender, SendOptions, open_session


@pytest.fixture
def fake(load: Callable[[str], Any]) -> Any:
    """tests/benchmarks/fake_server.py: FakeServer, Script, steady."""
    return load("fake_server")


@pytest.fixture
def request_of() -> Callable[..., LoadRequest]:
    """(index=0, due_s=0, num_input=8, num_output=4, cancel_after=None) -> a request of its own tokens."""

    def make(
        index: int = 0, due_s: float = 0.0, num_input: int = 8, num_output: int = 4,
        cancel_after: int | None = None, seed: int | None = None,
    ) -> LoadRequest:  # fmt: skip
        ids = np.random.default_rng(index if seed is None else seed).integers(100, 2000, num_input, dtype=np.uint32)
        return LoadRequest(index, due_s, ids, num_output, block_keys(ids), cancel_after, True)

    return make


@pytest.fixture
def sender_to() -> Callable[..., AbstractAsyncContextManager[Sender]]:
    """(url, url …, **SendOptions) -> an open sender."""

    @asynccontextmanager
    async def open_sender(*urls: str, **options: Any) -> AsyncIterator[Sender]:
        async with open_session() as session:
            yield Sender(session, urls, SendOptions(**({"model": "fake"} | options)), "test")

    return open_sender
