"""proxy/requests/generation.py over a real router and scripted workers."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from halfmoon.protocol.errors import Overloaded, RequestCancelled
from halfmoon.proxy.requests.generate_request import GenerateRequest
from halfmoon.proxy.requests.generation import ChoiceEnd, Generator, TextDelta


def generator(face: Any) -> Generator:
    return Generator(face.server.router, face.tokenizer, face.server.card, 60.0)


def test_choices_that_do_not_all_fit_leave_nothing_running(make_face: Callable[..., Any]) -> None:
    face = make_face(max_queued_requests=3)

    async def run() -> None:
        with pytest.raises(Overloaded) as caught:  # holds the error, and with it the frames that it passed
            await generator(face).open(GenerateRequest(prompts=["Hello"], n=5))
        assert face.num_under_way == 0 and caught.value.retry_after_s >= 1
        assert [event async for event in await generator(face).open(GenerateRequest(prompts=["Hello"], n=3))]

    face.call(run())


def test_choices_without_room_for_all_are_refused_before_the_first_is_admitted(make_face: Callable[..., Any]) -> None:
    face = make_face(max_queued_requests=3)
    router = face.server.router

    async def run() -> None:
        face.workers.gate_at = 0
        maker = generator(face)
        first = await maker.open(GenerateRequest(prompts=["Hello"], request_id="first"))
        with pytest.raises(Overloaded, match="3 choices and there is room for 2") as caught:
            await maker.open(GenerateRequest(prompts=["Hello"], n=3))
        assert router.num_queued == 1 and len(router.streams) == 1
        assert caught.value.retry_after_s > 0
        async with await maker.open(GenerateRequest(prompts=["Hello"], n=2)):
            assert face.num_under_way == 3
        await first.aclose()

    face.call(run())


def test_a_choice_that_is_slow_does_not_hold_the_others(face: Any) -> None:
    async def run() -> None:
        asked = GenerateRequest(prompts=["Hello", "Once"], max_tokens=100)
        async with await generator(face).open(asked) as generation:
            seen: list[Any] = []
            async for event in generation:
                seen.append(event)
                if isinstance(event, ChoiceEnd):
                    break
            assert seen[-1].index == 0
            texts = [event.text for event in seen if isinstance(event, TextDelta) and event.index == 0]
            assert "".join(texts) == face.tokenizer.decode(face.answer)

    face.workers.gate_for = lambda sequence: sequence.request_id.endswith("-1")
    face.workers.gate_at = 1
    face.call(run())
    assert face.workers.cancelled.wait(60)


@pytest.mark.parametrize("how", ["aclose", "garbage", "never read"])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_in_any_way_cancels_every_choice(how: str, n: int, face: Any) -> None:
    face.workers.gate_at = 2

    async def run() -> None:
        generation = await generator(face).open(GenerateRequest(prompts=["Hello"], n=n))
        if how != "never read":
            async for event in generation:
                if isinstance(event, TextDelta):
                    break
        assert face.num_under_way == n
        if how == "aclose":
            await generation.aclose()
            assert face.num_under_way == 0
            return
        del generation
        gc.collect()
        async with asyncio.timeout(60):
            while face.num_under_way:
                await asyncio.sleep(0.01)

    face.call(run())


def test_a_reader_that_is_cancelled_cancels_its_choices(face: Any) -> None:
    face.workers.gate_at = 2

    async def run() -> None:
        generation = await generator(face).open(GenerateRequest(prompts=["Hello"], n=2))

        async def read() -> None:
            async for _ in generation:
                pass

        reader = asyncio.create_task(read())
        await asyncio.to_thread(face.workers.arrived.wait, 5)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert face.num_under_way == 0

    face.call(run())


def test_cancel_by_id_is_what_the_reader_gets(face: Any) -> None:
    face.workers.gate_at = 2

    async def run() -> None:
        maker = generator(face)
        generation = await maker.open(GenerateRequest(prompts=["Hello"], n=2, request_id="r"))
        assert await maker.cancel("r", "an operator said so")
        with pytest.raises(RequestCancelled, match="an operator said so"):
            async for _ in generation:
                pass
        assert not await maker.cancel("r", "again")
        again = await maker.open(GenerateRequest(prompts=["Hello"], request_id="r"))
        await again.aclose()

    face.call(run())
