"""The sync and the async client against a real proxy: the same behaviour, tested through one harness."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from halfmoon.client import (
    Admitted,
    AsyncClient,
    AsyncStream,
    Client,
    Conversation,
    DeadlineExceeded,
    Delta,
    Finished,
    InvalidRequest,
    PromptTooLong,
    RequestCancelled,
    Stream,
    Unavailable,
    UnknownModel,
)
from halfmoon.protocol.errors import NoWorker, Overloaded
from halfmoon.protocol.grpc_errors import unary_boundary
from halfmoon.protocol.v1 import inference_pb2, inference_pb2_grpc

ANSWER = "The quick brown fox, 日本語 and 😀 jumps over the lazy dog."


class Blocking:
    """Client as it is."""

    def __init__(self, address: str, **options: Any) -> None:
        self.client = Client(address, **options)

    def call(self, method: str, **arguments: Any) -> Any:
        return getattr(self.client, method)(**arguments)

    def events(self, **ask: Any) -> Iterator[Any]:
        with self.client.stream(**ask) as stream:
            yield from stream

    def leave(self, how: str, **ask: Any) -> Any:
        """Reads up to the first text, then leaves in the way that `how` names. Returns the stream where it is not dropped."""
        stream = self.client.stream(**ask)
        for event in stream:
            if isinstance(event, Delta):
                break
        if how == "close":
            stream.close()
        elif how == "with":
            with stream:
                pass
        if how != "garbage":
            return stream
        del stream
        return gc.collect()

    def close(self) -> None:
        self.client.close()


class Awaiting:
    """AsyncClient, on an event loop of the test's own."""

    def __init__(self, address: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(self._open(address, **options))

    async def _open(self, address: str, **options: Any) -> AsyncClient:
        return AsyncClient(address, **options)

    def call(self, method: str, **arguments: Any) -> Any:
        return self.loop.run_until_complete(getattr(self.client, method)(**arguments))

    def events(self, **ask: Any) -> Iterator[Any]:
        async def read() -> list[Any]:
            async with self.client.stream(**ask) as stream:
                return [event async for event in stream]

        yield from self.loop.run_until_complete(read())

    def leave(self, how: str, **ask: Any) -> Any:
        async def read() -> Any:
            stream = self.client.stream(**ask)
            async for event in stream:
                if isinstance(event, Delta):
                    break
            if how == "close":
                stream.close()
            elif how == "with":
                async with stream:
                    pass
            kept = stream if how != "garbage" else None
            del stream
            gc.collect()
            await asyncio.to_thread(self.cancelled.wait, 60)  # the cancel leaves through the loop
            return kept

        return self.loop.run_until_complete(read())

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@pytest.fixture(params=[Blocking, Awaiting], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, face: Any) -> Iterator[Any]:
    client = kind(face.grpc, control=face.control)
    client.cancelled = face.workers.cancelled
    yield client
    client.close()


def test_a_completion_has_everything(client: Any, face: Any) -> None:
    completion = client.call("generate", prompt="Hello", max_tokens=100, request_id="r", num_logprobs=2)
    assert (completion.text, completion.finish_reason, completion.model) == (ANSWER, "stop", "chatty")
    assert completion.request_id == face.workers.requests[0].request_id != "r", "what the client says is a label"
    assert completion.token_ids == (*face.answer, 1)
    assert (completion.usage.num_prompt_tokens, completion.usage.num_completion_tokens) == (6, len(face.answer) + 1)
    assert completion.usage.num_cached_tokens == 4
    assert completion.phases.prefill_s == 0.75 and completion.phases.decode_worker == "decode-0"
    assert [token.text for token in completion.logprobs[:2]] == ["The", " quick"]
    assert completion.logprobs[0].logprob == -0.5 and len(completion.logprobs[0].top) == 2
    assert completion.logprobs[0].top[0].text == "The"


def test_a_stream_gives_admitted_deltas_and_finished(client: Any, face: Any) -> None:
    first, *deltas, last = client.events(prompt="Hello", max_tokens=100)
    assert isinstance(first, Admitted) and isinstance(last, Finished) and last.finish_reason == "stop"
    assert "".join(delta.text for delta in deltas) == ANSWER and len(deltas) > 10


def test_several_choices_stay_apart(client: Any, face: Any) -> None:
    face.workers.script = lambda sequence: random.Random(sequence.sampling.seed).choices(face.answer, k=20)
    completion = client.call("generate", token_ids=[5, 6], n=3, seed=9, max_tokens=8)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert list(choice.token_ids) == random.Random(9 + choice.index).choices(face.answer, k=20)[:8]
        assert choice.text == face.tokenizer.decode(choice.token_ids) and choice.finish_reason == "length"
    assert completion.usage.num_completion_tokens == 24 and completion.usage.num_prompt_tokens == 2


def test_a_stop_string_is_cut_and_named(client: Any, face: Any) -> None:
    (choice,) = client.call("generate", prompt="Hello", max_tokens=100, stop=["x", " jumps over"]).choices
    assert choice.matched_stop == "x" and choice.text == "The quick brown fo"


def test_a_conversation_is_sent_whole(client: Any, face: Any) -> None:
    chat = Conversation(system="Be brief.")
    chat.assistant(client.call("generate", messages=chat.user("one")))
    client.call("generate", messages=chat.user("two"))
    prompt = face.tokenizer.decode(list(face.workers.requests[1].token_ids), skip_special_tokens=False)
    assert prompt == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_models_and_status_are_typed(client: Any) -> None:
    (model,) = client.call("models")
    assert (model.id, model.max_model_len) == ("chatty", 512)
    status = client.call("status")
    assert {member.role for member in status.members} == {"prefill", "decode", "store"}
    assert status.model == "chatty" and not status.draining and status.members[0].kv_usage_ratio == 0.25
    assert status.as_dict()["members"][0]["num_waiting"] == 2


@pytest.mark.parametrize("how", ["close", "with", "garbage"])
def test_a_stream_that_is_left_is_cancelled_in_the_cluster(how: str, client: Any, face: Any) -> None:
    face.workers.gate_at = 3
    kept = client.leave(how, prompt="Hello")
    assert face.workers.cancelled.wait(60)
    if how != "garbage":
        assert isinstance(kept, Stream | AsyncStream)


def test_errors_come_typed_with_their_fields(client: Any) -> None:
    with pytest.raises(UnknownModel) as unknown:
        client.call("generate", prompt="x", model="other")
    assert unknown.value.fields["param"] == "model"
    with pytest.raises(PromptTooLong) as long:
        client.call("generate", token_ids=[7] * 600)
    assert (long.value.fields["num_prompt_tokens"], long.value.fields["max_model_len"]) == (600, 512)


def test_a_deadline_is_the_servers_and_says_where_the_time_went(client: Any, face: Any) -> None:
    face.workers.gate_at = 1
    with pytest.raises(DeadlineExceeded, match="ran out in state decode"):  # the answer is held at a gate: only the deadline ends it
        client.call("generate", prompt="Hello", timeout_s=1.0)


def test_without_a_deadline_a_request_and_a_call_come_to_their_end(client: Any, face: Any) -> None:
    assert client.call("generate", prompt="Hello", max_tokens=100, timeout_s=float("inf")).text == ANSWER
    (sequence,) = face.workers.requests
    assert 7 * 24 * 3600 - 60 < sequence.deadline_s <= 7 * 24 * 3600
    assert client.call("models", timeout_s=float("inf"))[0].id == "chatty"


@pytest.mark.parametrize("timeout_s", [float("nan"), 0.0, -1.0, 1e12])
@pytest.mark.parametrize(
    ("method", "arguments"), [("generate", {"prompt": "x"}), ("models", {}), ("cancel", {"request_id": "x"}), ("status", {})]
)
def test_a_timeout_out_of_range_is_refused_by_name(
    method: str, arguments: dict[str, Any], timeout_s: float, client: Any, face: Any
) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout_s is .* above 0 and at most 604800") as caught:
        client.call(method, timeout_s=timeout_s, **arguments)
    assert caught.value.fields["param"] == "timeout_s" and face.workers.requests == []


@pytest.mark.parametrize(
    ("method", "arguments"), [("generate", {"prompt": "x"}), ("models", {}), ("cancel", {"request_id": "x"}), ("status", {})]
)
def test_a_closed_client_says_so(method: str, arguments: dict[str, Any], kind: Any, face: Any) -> None:
    closed = kind(face.grpc)
    closed.call("close")
    closed.call("close")  # again is nothing
    with pytest.raises(RuntimeError, match=r"this client of .* was closed; make another"):
        closed.call(method, **arguments)


def test_cancel_ends_a_stream_that_somebody_else_reads(client: Any, face: Any) -> None:
    face.workers.gate_at = 3
    found: list[bool] = []

    def cancel() -> None:
        assert face.workers.arrived.wait(60)
        with Client(face.grpc) as other:
            found.append(other.cancel("mine"))
            found.append(other.cancel(face.workers.requests[0].request_id))

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(RequestCancelled):
        list(client.events(prompt="Hello", request_id="mine"))
    thread.join()
    assert found == [False, True]


def test_nobody_there_is_unavailable_after_a_few_attempts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfmoon.client.attempts.FIRST_DELAY_S", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = kind(f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"the proxy at 127\.0\.0\.1"):
            client.call("generate", prompt="x")
        with pytest.raises(Unavailable):
            client.call("models")
        client.close()


def test_a_request_waits_for_a_proxy_that_is_still_starting(kind: Any, make_face: Any) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    client = kind(f"127.0.0.1:{port}")
    starting = threading.Timer(0.3, make_face, kwargs={"grpc_port": port})
    starting.start()
    with contextlib.suppress(NoWorker):  # reached it before its workers had joined
        assert client.call("generate", prompt="Hello", max_tokens=3, timeout_s=60).token_ids != ()
    assert client.call("models")[0].id == "chatty"
    client.close()
    starting.join()


class Refusing(inference_pb2_grpc.InferenceServicer):
    """Refuses in the way that the prompt names; counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    @unary_boundary
    async def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self.num_calls += 1
        if request.prompt == "no worker":
            raise NoWorker("no decode worker has joined")
        if request.prompt == "overloaded":
            raise Overloaded("full", retry_after_s=7.5)
        await context.write(inference_pb2.GenerateReply(admitted=inference_pb2.GenerateReply.Admitted(request_id="r")))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")


@pytest.fixture
def refusing(face: Any) -> Iterator[tuple[Refusing, str]]:
    servicer = Refusing()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = face.call(start())
    yield servicer, f"127.0.0.1:{port}"
    face.call(server.stop(None))


@pytest.mark.parametrize(("prompt", "error"), [("no worker", NoWorker), ("overloaded", Overloaded), ("break", Unavailable)])
def test_nothing_is_tried_twice_that_the_proxy_has_answered(
    prompt: str, error: type[Exception], kind: Any, refusing: tuple[Refusing, str]
) -> None:
    servicer, address = refusing
    client = kind(address)
    with pytest.raises(error) as caught:
        client.call("generate", prompt=prompt)
    client.close()
    assert type(caught.value) is error and servicer.num_calls == 1
    if isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 7.5


def test_the_text_of_a_stream_is_a_plain_iterator(face: Any) -> None:
    with Client(face.grpc) as client:
        assert "".join(client.stream(prompt="Hello", max_tokens=100).text()) == ANSWER


def test_a_completion_can_be_had_from_a_stream_that_was_read(face: Any) -> None:
    with Client(face.grpc) as client, client.stream(prompt="Hello", max_tokens=4) as stream:
        assert stream.request_id is None
        next(stream)
        request_id = stream.request_id
        assert stream.completion().text == "The quick brown fox"
        assert request_id == face.workers.requests[0].request_id


async def test_a_cancelled_task_cancels_its_request(face: Any) -> None:
    face.workers.gate_at = 3
    async with AsyncClient(face.grpc) as client:
        task = asyncio.create_task(client.generate(prompt="Hello"))
        assert await asyncio.to_thread(face.workers.arrived.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(face.workers.cancelled.wait, 1)


def test_one_client_serves_many_threads(face: Any) -> None:
    with Client(face.grpc) as client:
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(client.generate(prompt="Hello", max_tokens=100).text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == [ANSWER] * 8
