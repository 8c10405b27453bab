"""proxy/request_process.py: what is parsed in the other process arrives as it would here, and its death costs one request."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest

from halfmoon.protocol.errors import InternalError, InvalidRequest
from halfmoon.proxy.inference_service import parse_request
from halfmoon.proxy.request_process import PIECE_LEN, RequestProcess, pack, unpack_messages, unpack_prompts
from halfmoon.proxy.text.chat_template import ChatMessage


@pytest.fixture
async def process() -> AsyncIterator[RequestProcess]:
    made = RequestProcess()
    yield made
    await made.close()


@pytest.mark.parametrize("prompt", ["", "text 😀", [], [0, 2**32 - 1], list(range(2 * PIECE_LEN + 5))])
async def test_a_prompt_is_the_same_when_it_is_unpacked(prompt: str | list[int]) -> None:
    (found,) = unpack_prompts(pack(None, [prompt]))
    assert (found if isinstance(found, str) else list(found)) == prompt


async def test_messages_are_the_same_when_they_are_unpacked() -> None:
    messages = [ChatMessage("user", str(number)) for number in range(PIECE_LEN + 5)]
    assert await unpack_messages(pack(None, messages=messages)) == messages


async def test_an_error_of_the_tree_arrives_with_its_fields(process: RequestProcess) -> None:
    with pytest.raises(InvalidRequest, match="no input") as caught:
        await process.run(parse_request, b"")
    assert caught.value.fields == {"param": "prompt"}


async def test_the_death_of_the_process_costs_the_request_that_it_had(process: RequestProcess) -> None:
    assert await process.run(int, "7") == 7
    with pytest.raises(InternalError, match="send it again"):
        await process.run(os.kill, await process.run(os.getpid), signal.SIGKILL)
    assert await process.run(int, "8") == 8
