"""Anything at a worker, which serves both halves' services: a typed answer, an empty log, and a worker that serves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halfmoon.protocol.v1 import worker_pb2


async def test_anything_at_a_worker_gets_a_typed_answer(
    make_site: Any, reference: Any, fuzz: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site = await make_site()
    services = worker_pb2.DESCRIPTOR.services_by_name.values()
    statuses = await asyncio.to_thread(fuzz, site.worker.address, services)
    print(statuses)
    assert statuses["INVALID_ARGUMENT"] > 10
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    token_ids = list(range(3, 20))
    reply = await site.start(token_ids, "a")
    assert reply.state.first_token.token_id == reference(token_ids).token_id
    handoff = await site.fetch("a")
    assert handoff.state.num_tokens == len(token_ids)
