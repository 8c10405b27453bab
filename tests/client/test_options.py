"""client/options.py and client/completion.py: keywords to a message, a message to values."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pydoc
from typing import Any

import pytest

from halfmoon.client import AsyncClient, Client, Conversation, InvalidRequest, Message, PhaseRecord
from halfmoon.client.completion import Collector, event_from_proto
from halfmoon.client.options import MAX_TIMEOUT_S, GenerateOptions, Options, build_request
from halfmoon.protocol.v1 import common_pb2, inference_pb2


def test_every_field_of_the_request_has_a_keyword() -> None:
    fields = {field.name for field in inference_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert fields - {"tokens", "chat"} | {"token_ids", "messages"} == set(GenerateOptions.__annotations__)


def test_only_what_is_given_is_sent() -> None:
    request = build_request({"prompt": "x", "temperature": 0.0, "seed": None})
    assert request == inference_pb2.GenerateRequest(prompt="x", temperature=0.0)
    assert request.HasField("temperature") and not request.HasField("seed")


def test_every_kind_of_value_has_its_place() -> None:
    request = build_request(
        {
            "messages": [Message("user", "a"), {"role": "assistant", "content": "b"}],
            "stop": "x",
            "stop_token_ids": [3],
            "logit_bias": {5: -1},
        }
    )
    assert [(turn.role, turn.content) for turn in request.chat.messages] == [("user", "a"), ("assistant", "b")]
    assert (list(request.stop), list(request.stop_token_ids), dict(request.logit_bias)) == (["x"], [3], {5: -1.0})
    assert list(build_request({"token_ids": [], "stop": ["a", "b"]}).stop) == ["a", "b"]
    assert build_request({"token_ids": []}).WhichOneof("input") == "tokens"


def test_further_options_have_their_place() -> None:
    request = build_request(
        {
            "prompt": "x",
            "bad_words": ["a", "b"],
            "truncate_prompt_tokens": -1,
            "cache_salt": "s",
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "add_special_tokens": False,
            "chat_template_kwargs": {"enable_thinking": False},
            "reasoning_effort": "low",
            "add_generation_prompt": False,
            "continue_final_message": True,
        }
    )
    assert (list(request.bad_words), request.truncate_prompt_tokens, request.cache_salt) == (["a", "b"], -1, "s")
    assert request.HasField("skip_special_tokens") and request.HasField("add_special_tokens") and request.HasField("add_generation_prompt")
    assert (request.chat_template_kwargs, request.reasoning_effort) == ('{"enable_thinking": false}', "low")
    assert request.include_stop_str_in_output and request.continue_final_message


@pytest.mark.parametrize("method", [Client.generate, Client.stream, AsyncClient.generate, AsyncClient.stream])
def test_help_shows_every_option(method: Any) -> None:
    shown = pydoc.plain(pydoc.render_doc(method))
    assert set(inspect.signature(method).parameters) == {"self", *GenerateOptions.__annotations__}
    assert all(f"{name}: " in shown for name in GenerateOptions.__annotations__)
    assert "what the text has to match" in shown


def test_no_deadline_is_the_proxys_longest() -> None:
    assert build_request({"prompt": "x", "timeout_s": math.inf}).timeout_s == MAX_TIMEOUT_S == 7 * 24 * 3600
    assert build_request({"prompt": "x", "timeout_s": MAX_TIMEOUT_S}).timeout_s == MAX_TIMEOUT_S


@pytest.mark.parametrize(
    ("ask", "param", "message"),
    [
        ({"prompt": "x", "temprature": 1}, "temprature", "is not an option; the options are model, request_id"),
        ({}, None, "this one has none"),
        ({"prompt": "x", "token_ids": [1]}, None, "prompt and token_ids"),
        ({"prompt": 3}, "prompt", "prompt is 3"),
        ({"prompt": "x", "timeout_s": float("nan")}, "timeout_s", "timeout_s is nan; it must be a number of seconds above 0"),
        ({"prompt": "x", "timeout_s": 0}, "timeout_s", "timeout_s is 0; .* above 0"),
        ({"prompt": "x", "timeout_s": -1.0}, "timeout_s", "above 0"),
        ({"prompt": "x", "timeout_s": 1e12}, "timeout_s", r"at most 604800 \(7 days\)"),
        ({"prompt": "x", "timeout_s": "soon"}, "timeout_s", "timeout_s is 'soon'"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
        ({"prompt": "x", "seed": 2**64}, "seed", "seed is 18446744073709551616"),
        ({"token_ids": [1, "a"]}, "token_ids", "token_ids is"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": "hello"}, "messages", "messages is 'hello'"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "logit_bias is"),
        ({"prompt": "x", "stop": [1]}, "stop", "stop is"),
        ({"prompt": "x", "bad_words": "one"}, "bad_words", "bad_words is 'one': it is a list"),
        ({"prompt": "x", "chat_template_kwargs": [1]}, "chat_template_kwargs", "chat_template_kwargs is"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_sent(ask: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        build_request(ask)
    assert caught.value.fields.get("param") == param


def test_the_phase_record_has_every_field_of_the_message() -> None:
    names = {field.name for field in common_pb2.PhaseRecord.DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(PhaseRecord)} == names
    message = common_pb2.PhaseRecord(ttft_s=0.5, decode_worker="d", num_attempts=2)
    assert PhaseRecord.from_proto(message).as_dict()["ttft_s"] == 0.5


def test_a_collector_without_an_end_has_no_completion() -> None:
    collector = Collector()
    reply = inference_pb2.GenerateReply
    collector.add(event_from_proto(reply(admitted=reply.Admitted(request_id="r"))))
    collector.add(event_from_proto(reply(delta=reply.Delta(index=0, text="x"))))
    with pytest.raises(ValueError, match="has not ended"):
        collector.completion()


def test_a_conversation_remembers_and_takes_back() -> None:
    chat = Conversation(system="be brief")
    sent = chat.user("one")
    assert sent == [Message("system", "be brief"), Message("user", "one")]
    chat.assistant("1")
    chat.user("two")
    chat.undo()
    assert chat.messages == [*sent, Message("assistant", "1")]
    chat.undo()
    chat.undo()
    assert chat.messages == [Message("system", "be brief")]


def test_options_are_the_same_for_both_clients() -> None:
    assert set(Options.__annotations__) < set(GenerateOptions.__annotations__)
