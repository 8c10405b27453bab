"""Fields of requests beyond the everyday ones: vLLM's extensions, hints of OpenAI's, and what replies say of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from halfmoon.proxy.text.chat_template import ChatTemplate
from halfmoon.proxy.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
END = 3  # <|im_end|>


@pytest.fixture(scope="module")
def http(shared_face: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_face.http, timeout=60) as client:
        yield client


def ask(http: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> Any:
    begin = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    reply = http.post(path, json={**begin, "max_tokens": 50, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(http: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> list[Any]:
    begin = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    with http.stream("POST", path, json={**begin, "max_tokens": 50, "stream": True, **fields}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refused(http: httpx.Client, path: str = COMPLETIONS, status: int = 400, **fields: Any) -> dict[str, Any]:
    begin = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    reply = http.post(path, json={**begin, **fields})
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def prompt_of(face: Any) -> str:
    return face.tokenizer.decode(face.workers.requests[-1].token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_chunk_counts_its_choice_s_tokens_so_far(path: str, face: Any, http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = chunks(http, path, stream_options=options, n=2)
    total = found.pop()
    assert total["usage"]["completion_tokens"] == 2 * (len(face.answer) + 1)
    for index in range(2):
        counts = [chunk["usage"]["completion_tokens"] for chunk in found if chunk["choices"][0]["index"] == index]
        assert counts == sorted(counts) and counts[-1] == len(face.answer) + 1
    assert all(chunk["usage"]["prompt_tokens"] == total["usage"]["prompt_tokens"] for chunk in found)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"stop": ["fox", "dog"]}, "fox"), ({"stop_token_ids": [END]}, END), ({"stop": ["<|im_end|>"]}, "<|im_end|>"), ({}, None)],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_choice_says_what_ended_it(path: str, fields: dict[str, Any], reason: Any, face: Any, http: httpx.Client) -> None:
    if reason in (END, "<|im_end|>"):
        face.workers.script = lambda sequence: [*face.answer, END]
    (choice,) = ask(http, path, **fields)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
    last = chunks(http, path, **fields)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)


def test_an_answer_of_full_length_has_no_stop_reason(face: Any, http: httpx.Client) -> None:
    (choice,) = ask(http, max_tokens=3)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_the_stop_string_is_part_of_the_text_where_that_is_asked_for(face: Any, http: httpx.Client) -> None:
    assert ask(http, stop="fox")["choices"][0]["text"] == "The quick brown "
    assert ask(http, stop="fox", include_stop_str_in_output=True)["choices"][0]["text"] == "The quick brown fox"


def test_special_tokens_have_text_where_that_is_asked_for(face: Any, http: httpx.Client) -> None:
    face.workers.script = lambda sequence: [face.answer[0], 2, END, face.answer[1], 1]
    shown = face.tokenizer.decode([face.answer[0], 2, END, face.answer[1]], skip_special_tokens=False)
    hidden = face.tokenizer.decode(face.answer[:2])
    assert ask(http)["choices"][0]["text"] == hidden
    assert ask(http, skip_special_tokens=True)["choices"][0]["text"] == hidden
    assert ask(http, skip_special_tokens=False)["choices"][0]["text"] == shown
    assert "<|im_start|>" in shown


def test_token_ids_come_back_where_they_are_asked_for(face: Any, http: httpx.Client) -> None:
    reply = ask(http, prompt=[face.tokenizer.encode("Hello"), [5, 6]], return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in reply["choices"]] == [face.tokenizer.encode("Hello"), [5, 6]]
    assert all(choice["token_ids"] == [*face.answer, 1] for choice in reply["choices"])
    chat = ask(http, CHAT, return_token_ids=True)
    assert chat["prompt_token_ids"] == list(face.workers.requests[-1].token_ids)
    assert chat["choices"][0]["token_ids"] == [*face.answer, 1]
    assert "prompt_token_ids" not in ask(http, CHAT) and "token_ids" not in ask(http)["choices"][0]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_token_ids_come_back_in_a_stream_too(path: str, face: Any, http: httpx.Client) -> None:
    first, *others = chunks(http, path, return_token_ids=True)
    place = first if path == CHAT else first["choices"][0]
    assert place["prompt_token_ids"] == list(face.workers.requests[-1].token_ids)
    assert [token_id for chunk in others for token_id in chunk["choices"][0].get("token_ids", [])] == [*face.answer, 1]


def test_replies_name_what_they_are_made_by(face: Any, http: httpx.Client) -> None:
    replies = [ask(http), ask(http, CHAT, service_tier="flex"), *chunks(http, CHAT)]
    assert len({reply["system_fingerprint"] for reply in replies}) == 1
    assert replies[0]["system_fingerprint"].startswith("fp_")
    assert all(reply["service_tier"] == "default" for reply in replies[1:])


def test_top_k_of_minus_one_is_all_tokens(face: Any, http: httpx.Client) -> None:
    ask(http, top_k=-1)
    assert face.workers.requests[-1].sampling.top_k == 0
    assert refused(http, top_k=-2)["param"] == "top_k"


def test_bad_words_are_tokens_that_do_not_come(face: Any, http: httpx.Client) -> None:
    ask(http, bad_words=["."], logit_bias={"9": 1})
    (dot,) = face.tokenizer.encode(".", add_special_tokens=False)
    assert dict(face.workers.requests[-1].sampling.logit_bias) == {dot: -100.0, 9: 1.0}
    assert "no single token" in refused(http, bad_words=["zyx wvu"])["message"]


@pytest.mark.parametrize(("kept", "num_tokens"), [(3, 3), (1000, 20), (-1, 20), (None, 20)])
def test_of_a_long_prompt_the_end_is_taken(kept: int | None, num_tokens: int, face: Any, http: httpx.Client) -> None:
    ask(http, prompt=list(range(20, 40)), truncate_prompt_tokens=kept)
    assert list(face.workers.requests[-1].token_ids) == list(range(40 - num_tokens, 40))


def test_a_prompt_that_is_too_long_is_cut_to_what_the_model_takes(face: Any, http: httpx.Client) -> None:
    ask(http, prompt=[7] * 600 + [8], truncate_prompt_tokens=-1, max_tokens=2)
    assert list(face.workers.requests[-1].token_ids) == [7] * 509 + [8]
    assert refused(http, truncate_prompt_tokens=0)["param"] == "truncate_prompt_tokens"


def test_a_prefix_is_shared_by_requests_of_the_same_salt_alone(face: Any, http: httpx.Client) -> None:
    prompt = list(range(20, 60))
    for salt in (None, "a", "a", "b"):
        ask(http, prompt=prompt, cache_salt=salt)
    plain, first, again, other = ([*request.block_keys] for request in face.workers.requests)
    assert first == again and len({plain[0], first[0], other[0]}) == 3
    roots = [request.root for request in face.workers.requests]
    assert roots[0] == b"" and roots[1] == roots[2] != roots[3] != b""


def test_a_template_s_variables_reach_it(face: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ add_generation_prompt }}", {})
    monkeypatch.setattr(Tokenizer, "chat_template", template)
    ask(http, CHAT, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(face) == "Hello|False||True"
    ask(http, CHAT, reasoning_effort="high", add_generation_prompt=False)
    assert prompt_of(face) == "Hello||high|False"
    ask(http, CHAT, reasoning_effort="none")
    assert prompt_of(face) == "Hello|False|none|True"
    ask(http, CHAT, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert prompt_of(face) == "Hello|True|none|True"


def test_an_answer_goes_on_with_the_last_message(face: Any, http: httpx.Client) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The quick"}]
    ask(http, CHAT, messages=begun, continue_final_message=True)
    assert prompt_of(face).endswith("<|im_start|>assistant\nThe quick")
    both = refused(http, CHAT, messages=begun, continue_final_message=True, add_generation_prompt=True)
    assert both["param"] == "continue_final_message"


def test_a_variable_that_is_a_field_is_refused(http: httpx.Client) -> None:
    assert "chat_template_kwargs has messages" in refused(http, CHAT, chat_template_kwargs={"messages": []})["message"]


def test_a_text_part_may_have_more_and_a_part_of_another_type_is_refused_by_it(face: Any, http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Hel", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "lo"}]
    ask(http, CHAT, messages=[{"role": "user", "content": parts}])
    assert "Hel\nlo" in prompt_of(face)
    for kind in ("image_url", "input_audio", "file"):
        error = refused(http, CHAT, messages=[{"role": "user", "content": [parts[0], {"type": kind, kind: {}}]}])
        assert error["param"] == "messages[0].content[1]" and f"is of type '{kind}'" in error["message"]


def test_a_prompt_is_taken_without_bos_where_that_is_asked_for(face: Any, http: httpx.Client) -> None:
    ask(http, add_special_tokens=False)
    assert list(face.workers.requests[-1].token_ids) == face.tokenizer.encode("Hello", add_special_tokens=False)


def test_too_long_a_prompt_and_an_unknown_model_have_the_codes_and_words_that_clients_look_for(http: httpx.Client) -> None:
    for path, fields in (
        (COMPLETIONS, {"prompt": [5] * 512}),
        (COMPLETIONS, {"prompt": [5] * 500, "max_tokens": 13}),
        (COMPLETIONS, {"prompt": "x" * 600_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
    ):
        error = refused(http, path, **fields)
        assert error["code"] == "context_length_exceeded"
        assert "this model's maximum context length is" in error["message"].lower(), "what litellm's context fallback looks for"
    unknown = refused(http, status=404, model="other")
    assert unknown["code"] == "model_not_found" and "does not exist" in unknown["message"]


def test_more_than_128_prompts_are_one_request(face: Any, http: httpx.Client) -> None:
    face.workers.script = lambda sequence: [sequence.token_ids[0], 1]
    reply = ask(http, prompt=[[5 + index % 40] for index in range(300)], return_token_ids=True)
    assert [choice["token_ids"][0] for choice in reply["choices"]] == [5 + index % 40 for index in range(300)]
    assert "513 choices" in refused(http, status=429, prompt=[[5]] * 513)["message"], "more than may wait at a time"
    assert "2049 prompts; a request may have 2048" in refused(http, prompt=[[5]] * 2049)["message"]


def test_a_body_may_be_gzipped(face: Any, http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = json.dumps({"prompt": "Hello", "max_tokens": 50}).encode()
    assert http.post(COMPLETIONS, content=gzip.compress(body), headers=headers).json()["choices"][0]["text"]
    for content, message in ((body, "is not gzip"), (gzip.compress(body)[:-9], "ends before its end")):
        reply = http.post(COMPLETIONS, content=content, headers=headers)
        assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    bomb = gzip.compress(b" " * (17 * 2**20))
    reply = http.post(COMPLETIONS, content=bomb, headers=headers)
    assert reply.status_code == 413 and "once it is unpacked" in reply.json()["error"]["message"]
