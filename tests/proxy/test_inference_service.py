"""proxy/inference_service.py and the proxy's gRPC listener, through plain stubs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from halfmoon.client import Client
from halfmoon.protocol.errors import InvalidRequest, PromptTooLong, RequestCancelled, UnknownModel
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from halfmoon.proxy.inference_service import parse_request, request_from_proto
from halfmoon.proxy.text.chat_template import ChatTemplate
from halfmoon.proxy.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def channel(shared_face: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(shared_face.grpc) as channel:
        yield channel


@pytest.fixture
def stub(face: Any, channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def generate(stub: Any, **fields: Any) -> list[inference_pb2.GenerateReply]:
    return list(stub.Generate(inference_pb2.GenerateRequest(**fields), timeout=60))


def test_a_stream_is_admitted_then_deltas_then_finished(face: Any, stub: Any) -> None:
    first, *deltas, last = generate(stub, prompt="Hello", max_tokens=100, request_id="mine")
    assert first.admitted == inference_pb2.GenerateReply.Admitted(
        request_id=face.workers.requests[0].request_id, model="chatty", num_prompt_tokens=len(face.tokenizer.encode("Hello"))
    )
    assert "".join(reply.delta.text for reply in deltas) == face.tokenizer.decode(face.answer)
    assert [token.token_id for reply in deltas for token in reply.delta.tokens] == [*face.answer, 1]
    assert last.finished.reason == common_pb2.FINISH_REASON_STOP and last.finished.phases.prefill_worker == "prefill-0"
    assert last.finished.usage.num_completion_tokens == len(face.answer) + 1
    assert first.admitted.request_id != "mine", "that is the client's label"


def test_unset_fields_take_the_servers_defaults_and_zeros_are_meant(face: Any, stub: Any) -> None:
    generate(stub, tokens=inference_pb2.TokenIds(token_ids=[5, 6]))
    generate(stub, tokens=inference_pb2.TokenIds(token_ids=[5, 6]), temperature=0.0, top_k=0, seed=0, ignore_eos=False, num_logprobs=0)
    plain, zeros = (sequence.sampling for sequence in face.workers.requests)
    assert (plain.temperature, plain.top_p, plain.max_tokens) == (1.0, 1.0, 16) and not plain.HasField("num_logprobs")
    assert (zeros.temperature, zeros.seed) == (0.0, 0) and zeros.HasField("num_logprobs")


def test_fields_of_prompts_and_texts_are_those_of_http(face: Any, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Tokenizer, "chat_template", ChatTemplate("{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}", {})
    )
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="Hello")])
    generate(stub, chat=chat, chat_template_kwargs='{"enable_thinking": false}', reasoning_effort="high", max_tokens=1)
    generate(stub, prompt="Hello", add_special_tokens=False, cache_salt="a", bad_words=["."], max_tokens=1)
    generate(stub, prompt="Hello", truncate_prompt_tokens=1, max_tokens=1)
    asked, bare, cut = face.workers.requests
    assert face.tokenizer.decode(asked.token_ids) == "Hello|False|high"
    assert list(bare.token_ids) == face.tokenizer.encode("Hello", add_special_tokens=False) and bare.root
    assert list(bare.sampling.logit_bias.values()) == [-100.0]
    assert list(cut.token_ids) == face.tokenizer.encode("Hello")[-1:]
    face.workers.script = lambda sequence: [face.answer[0], 2, *face.answer[1:4], 1]

    def text(**fields: Any) -> str:
        return "".join(reply.delta.text for reply in generate(stub, prompt="Hello", **fields))

    assert text() == "The quick brown fox" and text(skip_special_tokens=False) == "The<|im_start|> quick brown fox"
    assert text(stop=["brown"], include_stop_str_in_output=True) == "The quick brown"


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_s_log_probabilities_come_before_the_answer(max_tokens: int, face: Any, stub: Any) -> None:
    token_ids = face.tokenizer.encode("Once upon a time")
    with Client(face.grpc) as client, client.stream(token_ids=token_ids, max_tokens=max_tokens, num_prompt_logprobs=2, n=2) as stream:
        kinds = [(type(event).__name__, getattr(event, "index", 0)) for event in stream]
        completion = stream.completion()
    for index, choice in enumerate(completion.choices):
        own = [kind for kind, found in kinds if found == index and kind != "Admitted"]
        assert own == sorted(own, key=["Prompt", "Delta", "Finished"].index) and "Prompt" in own
        assert [token.token_id for token in choice.prompt_logprobs] == token_ids[1:]
        assert [token.logprob for token in choice.prompt_logprobs] == [-index / 8 for index in range(1, len(token_ids))]
        assert [token.text for token in choice.prompt_logprobs] == [face.tokenizer.token_text(token_id) for token_id in token_ids[1:]]
        assert all([top.logprob for top in token.top] == [0.0, -0.25] for token in choice.prompt_logprobs)
        assert choice.text == ("The quick" if max_tokens else "") and choice.usage.num_completion_tokens == max_tokens
    assert "prompt" not in {reply.WhichOneof("event") for reply in generate(stub, prompt="x", max_tokens=1)}
    with pytest.raises(InvalidRequest, match="max_tokens is 0"), Client(face.grpc) as client:
        client.generate(prompt="x", max_tokens=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": '{"messages": 1}'}, "chat_template_kwargs"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(inference_pb2.GenerateRequest(prompt="x", **fields))
    assert caught.value.fields["param"] == param


def test_logprobs_come_with_the_texts_of_their_tokens(face: Any, stub: Any) -> None:
    _, *deltas, _ = generate(stub, prompt="Hello", max_tokens=3, num_logprobs=2)
    assert [text for reply in deltas for text in reply.delta.token_texts] == ["The", " quick", " brown"]
    assert [len(top.texts) for reply in deltas for top in reply.delta.top_texts] == [2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({}, InvalidRequest, "prompt"),
        ({"prompt": "x", "model": "other"}, UnknownModel, "model"),
        ({"tokens": inference_pb2.TokenIds(token_ids=[7] * 600)}, PromptTooLong, "prompt"),
        ({"chat": inference_pb2.ChatMessages()}, InvalidRequest, "messages"),
        ({"prompt": "x", "top_p": float("nan")}, InvalidRequest, "top_p"),
        ({"prompt": "x", "n": 0}, InvalidRequest, "n"),
    ],
)
def test_a_wrong_request_is_a_typed_error(fields: dict[str, Any], error: type[InvalidRequest], param: str, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        generate(stub, **fields)
    typed = from_rpc_error(caught.value, "the proxy")
    assert type(typed) is error and typed.fields["param"] == param
    assert caught.value.code() is error.grpc_status  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 3])
def test_cancel_ends_every_choice_of_a_request(n: int, face: Any, stub: Any) -> None:
    face.workers.gate_at = 2
    call = stub.Generate(inference_pb2.GenerateRequest(prompt="Hello", request_id="to-cancel", n=n), timeout=60)
    request_id = next(call).admitted.request_id
    while not next(call).delta.text:
        pass
    assert not stub.Cancel(inference_pb2.CancelRequest(request_id="to-cancel")).found, "others may guess a label"
    assert stub.Cancel(inference_pb2.CancelRequest(request_id=request_id)).found
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert isinstance(from_rpc_error(caught.value, "the proxy"), RequestCancelled)
    assert face.workers.cancelled.wait(60)
    assert not stub.Cancel(inference_pb2.CancelRequest(request_id=request_id)).found


def test_a_label_may_be_another_request_s_too(face: Any, stub: Any) -> None:
    face.workers.gate_at, face.workers.gate_for = 2, lambda sequence: sequence.sampling.max_tokens == 7
    call = stub.Generate(inference_pb2.GenerateRequest(prompt="Hello", request_id="twice", n=2, max_tokens=7), timeout=60)
    first = next(call).admitted.request_id
    other = generate(stub, prompt="Hello", request_id="twice")[0].admitted.request_id
    assert len({first, other, "twice"}) == 3
    face.open_gate()
    assert sum(reply.HasField("finished") for reply in call) == 2
    assert generate(stub, prompt="Hello", request_id="twice")[-1].HasField("finished")


def test_a_client_that_leaves_ends_its_request(face: Any, stub: Any) -> None:
    face.workers.gate_at = 3
    call = stub.Generate(inference_pb2.GenerateRequest(prompt="Hello", n=2), timeout=60)
    while not next(call).delta.text:
        pass
    call.cancel()
    assert face.workers.cancelled.wait(60)


def test_a_deadline_ends_the_request_with_its_own_error(face: Any, stub: Any) -> None:
    face.workers.gate_at = 1
    with pytest.raises(grpc.RpcError, match="ran out") as caught:
        generate(stub, prompt="Hello", timeout_s=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]


def test_the_model_and_its_limits_are_told(stub: Any) -> None:
    (model,) = stub.Models(inference_pb2.ModelsRequest()).models
    assert (model.id, model.max_model_len, model.dtype) == ("chatty", 512, "float32") and model.vocab_size > 300


def test_health_is_told_per_service(face: Any, channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "halfmoon.v1.Inference"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_every_service_for_clients(face: Any, channel: grpc.Channel) -> None:
    names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"halfmoon.v1.Inference", "grpc.health.v1.Health"} <= set(names) and "halfmoon.v1.Control" not in names


def test_many_requests_at_once_get_their_own_answers(face: Any, stub: Any) -> None:
    face.workers.script = lambda sequence: [*sequence.token_ids] * 3
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        prompt = [10 + number, 20 + number]
        _, *deltas, _ = generate(stub, tokens=inference_pb2.TokenIds(token_ids=prompt), ignore_eos=True)
        answers[number] = [token.token_id for reply in deltas for token in reply.delta.tokens]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [10 + number, 20 + number] * 3 for number in range(8)}


LARGE = {
    "tokens": inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(token_ids=[300] * 1_000_000)),
    "messages": inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="xx")] * 2**16)
    ),
}


@pytest.mark.parametrize("kind", ["tokens", "messages"])
def test_a_large_request_is_parsed_while_the_event_loop_turns(kind: str, face: Any, channel: grpc.Channel, loop_gap: Any) -> None:
    content = LARGE[kind].SerializeToString()
    generate = channel.unary_stream("/halfmoon.v1.Inference/Generate")
    began = time.process_time()
    parse_request(content)
    alone_s, gaps_s = time.process_time() - began, []
    for _ in range(3):
        with loop_gap(face._loop) as gap, pytest.raises(grpc.RpcError) as caught:
            list(generate(content, timeout=30))
        gaps_s.append(gap.longest_s)
        assert isinstance(from_rpc_error(caught.value, "proxy"), PromptTooLong)
    assert min(gaps_s) < alone_s / 2, f"{gaps_s} of {alone_s:.3f} s"


def test_a_large_request_means_what_a_small_one_does(face: Any, channel: grpc.Channel) -> None:
    """What makes it large is a field of a version to come, so that its prompt still fits the model."""
    request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(token_ids=[5, 6]), max_tokens=3, seed=9)
    unknown = b"\xc2\x3e" + b"\x80\xb5\x18" + b"x" * 400_000  # field 1000, of so many bytes
    call = channel.unary_stream("/halfmoon.v1.Inference/Generate", response_deserializer=inference_pb2.GenerateReply.FromString)
    replies = list(call(request.SerializeToString() + unknown, timeout=30))
    assert replies[-1].finished.usage == common_pb2.Usage(num_prompt_tokens=2, num_completion_tokens=3, num_cached_tokens=2)
    (sequence,) = face.workers.requests
    assert (list(sequence.token_ids), sequence.sampling.seed, sequence.sampling.max_tokens) == ([5, 6], 9, 3)


def test_what_is_no_request_is_an_invalid_one(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream("/halfmoon.v1.Inference/Generate")(b"\xff" * 10, timeout=10))
    assert isinstance(from_rpc_error(caught.value, "proxy"), InvalidRequest)
