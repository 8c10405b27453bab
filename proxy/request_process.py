"""Parses large requests in a process of their own. The code of JSON, pydantic and protobuf holds the interpreter's lock from the first
byte to the last, even in a thread, and so would stop every stream of the proxy.

bytes ─► process: parse, check ─► Packed (token ids as bytes) ─► token ids in an array, never as a million objects
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import concurrent.futures.process
import multiprocessing
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ..protocol.errors import InternalError
from .text.chat_template import ChatMessage

LARGE_BYTES = 2**18
"""Requests larger than this are parsed in the process. For smaller ones the parsers need a few milliseconds."""
PIECE_LEN = 2**11
"""Messages that are made in one go, in a few milliseconds."""

Parsed = TypeVar("Parsed")
Rest = TypeVar("Rest")
PackedPrompt = str | bytes | list[int]
"""A prompt's text, its token ids as 32-bit numbers, or one token id that no model has."""


class Packed(NamedTuple, Generic[Rest]):
    """A request on its way between the two processes. What may be long is packed; the rest is in the face's own form."""

    rest: Rest
    prompts: list[PackedPrompt]
    roles: list[str]  # of the messages
    contents: list[str]
    extras: dict[int, Mapping[str, Any]]  # of the messages that have more, by their position


def pack(rest: Rest, prompts: Sequence[str | Sequence[int]] = (), messages: Sequence[ChatMessage] = ()) -> Packed[Rest]:
    packed_prompts = [_pack_prompt(prompt) for prompt in prompts]
    extras = {position: message.extra for position, message in enumerate(messages) if message.extra}
    return Packed(rest, packed_prompts, [message.role for message in messages], [message.content for message in messages], extras)


def unpack_prompts(packed: Packed[Any]) -> list[str | Sequence[int]]:
    """Token ids come in arrays. To make, copy or free a list of a million takes 10 ms each time."""
    return [array("I", prompt) if isinstance(prompt, bytes) else prompt for prompt in packed.prompts]


async def unpack_messages(packed: Packed[Any]) -> list[ChatMessage]:
    messages: list[ChatMessage] = []
    for start in range(0, len(packed.roles), PIECE_LEN):
        end = start + PIECE_LEN
        messages += map(ChatMessage, packed.roles[start:end], packed.contents[start:end])
        await asyncio.sleep(0)
    for position, extra in packed.extras.items():
        messages[position] = messages[position]._replace(extra=extra)
    return messages


def _pack_prompt(prompt: str | Sequence[int]) -> PackedPrompt:
    if isinstance(prompt, str):
        return prompt
    try:
        return array("I", prompt).tobytes()
    except OverflowError:
        return [next(token_id for token_id in prompt if not 0 <= token_id < 2**32)]  # the request will be refused because of it


class RequestProcess:
    """Belongs to one event loop. The process starts with the first large request, or with warm_up()."""

    def __init__(self) -> None:
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def warm_up(self) -> None:
        """Starts the process now, so that no request waits for its imports."""
        self._running().submit(_nothing)

    async def run(self, parse: Callable[..., Parsed], *arguments: Any) -> Parsed:
        """Runs parse(*arguments) in the process. Arguments and result are pickled, which is fast only for few, large parts.

        Raises what parse raises, or InternalError if the process died meanwhile. The next call starts a new process.
        """
        executor = self._running()
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, parse, *arguments)
        except concurrent.futures.process.BrokenProcessPool as error:
            if self._executor is executor:
                self._executor = None
            raise InternalError("the process that parses large requests died under this one; send it again") from error

    async def close(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)

    def _running(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy gRPC's threads' locks
            self._executor = concurrent.futures.ProcessPoolExecutor(1, context)
        return self._executor


def _nothing() -> None:
    """What warm_up() has the process do."""
