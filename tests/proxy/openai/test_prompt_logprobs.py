"""echo with logprobs, prompt_logprobs and max_tokens 0, whole and streamed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from halfmoon.proxy.openai.prompt_scores import legacy_part, listed_part
from halfmoon.proxy.requests.prompt_text import Likely, PromptToken

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TEXT = "The quick brown fox, 日本語"
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def http(shared_face: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_face.http, timeout=60) as client:
        yield client


def asked(http: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> Any:
    reply = http.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(http: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> list[Any]:
    with http.stream("POST", path, json={**fields, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]", lines
    return [json.loads(line) for line in lines]


def joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """One choice of a stream as a whole reply has it."""
    found: dict[str, Any] = {"text": "", "logprobs": {name: [] for name in COLUMNS}, "prompt_logprobs": []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if choice["index"] == index:
            found["text"] += choice["text"]
            found["prompt_logprobs"] += choice.get("prompt_logprobs", [])
            for name in COLUMNS:
                found["logprobs"][name] += (choice["logprobs"] or {}).get(name, [])
    return found


def listed(face: Any, token_ids: list[int], num_top: int) -> list[Any]:
    """What the scripted workers say of a prompt, in vLLM's form."""
    found: list[Any] = [None]
    for index, token_id in enumerate(token_ids[1:], start=1):
        entries = {token_id: {"logprob": -index / 8, "rank": index, "decoded_token": face.tokenizer.token_text(token_id)}}
        for rank in range(1, num_top):
            likely = (token_id + rank) % 400
            entries[likely] = {"logprob": -rank / 4, "rank": rank + 1, "decoded_token": face.tokenizer.token_text(likely)}
        found.append({str(key): entry for key, entry in entries.items()})
    return found


@pytest.mark.parametrize("is_text", [True, False])
def test_an_echoed_prompt_has_the_log_probabilities_of_its_tokens_before_those_of_the_answer(
    is_text: bool, face: Any, http: httpx.Client
) -> None:
    token_ids = face.tokenizer.encode(TEXT)
    body = {"prompt": TEXT if is_text else token_ids, "echo": True, "logprobs": 3, "max_tokens": 2}
    (choice,) = asked(http, **body)["choices"]
    texts = [face.tokenizer.token_text(token_id) for token_id in token_ids]
    assert choice["text"] == TEXT + "The quick"
    assert choice["logprobs"]["tokens"] == [*texts, "The", " quick"]
    assert choice["logprobs"]["token_logprobs"] == [None, *(-index / 8 for index in range(1, len(token_ids))), -0.5, -1.0]
    tops = choice["logprobs"]["top_logprobs"]
    assert tops[0] is None and all(text in top for text, top in zip(texts[1:], tops[1:], strict=False))
    assert tops[1] == {face.tokenizer.token_text(token_ids[1] + rank): -rank / 4 for rank in range(3)}
    whole = face.tokenizer.decode(token_ids)
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[-2:] == [len(TEXT), len(TEXT) + 3] and offsets == sorted(offsets) and offsets[:2] == [0, 0], "BOS has no text"
    for offset, text in zip(offsets[1:6], texts[1:6], strict=True):
        assert whole[offset:].startswith(text)
    assert joined(streamed(http, **body)) == {**{name: choice[name] for name in ("text", "logprobs")}, "prompt_logprobs": []}


def test_each_prompt_and_choice_has_its_own(face: Any, http: httpx.Client) -> None:
    prompts = [face.tokenizer.encode(text) for text in ("Hello", "Once upon a time")]
    body = {"prompt": prompts, "echo": True, "logprobs": 0, "max_tokens": 1, "n": 2, "prompt_logprobs": 2}
    choices = asked(http, **body)["choices"]
    chunks = streamed(http, **body)
    for choice in choices:
        token_ids = prompts[choice["index"] // 2]
        assert len(choice["logprobs"]["tokens"]) == len(token_ids) + 1
        assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:]), "the token itself alone"
        assert choice["prompt_logprobs"] == listed(face, token_ids, 2)
        assert joined(chunks, choice["index"]) == {name: choice[name] for name in ("text", "logprobs", "prompt_logprobs")}
    assert all(sequence.sampling.num_prompt_logprobs == 2 for sequence in face.workers.requests)


def test_with_max_tokens_0_the_prompt_comes_back_alone(face: Any, http: httpx.Client) -> None:
    body = {"prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 0}
    reply = asked(http, **body)
    (choice,) = reply["choices"]
    num_tokens = len(face.tokenizer.encode("Hello"))
    assert (choice["text"], choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("Hello", "length", num_tokens)
    assert reply["usage"]["completion_tokens"] == 0 and reply["usage"]["prompt_tokens"] == num_tokens
    chunks = streamed(http, **body, stream_options={"include_usage": True})
    assert chunks.pop()["usage"]["completion_tokens"] == 0
    assert joined(chunks)["logprobs"] == choice["logprobs"] and chunks[-1]["choices"][0]["finish_reason"] == "length"
    face.workers.script = lambda sequence: [1]
    assert asked(http, prompt="Hello", echo=True, max_tokens=0)["choices"][0]["finish_reason"] == "length", "an EOS that nobody sees"


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_chat_s_prompt_is_scored_at_the_reply_s_top(max_tokens: int, face: Any, http: httpx.Client) -> None:
    body = {"messages": HELLO, "prompt_logprobs": 2, "max_tokens": max_tokens}
    reply = asked(http, CHAT, **body)
    expected = listed(face, list(face.workers.requests[-1].token_ids), 2)
    assert reply["prompt_logprobs"] == expected
    assert reply["choices"][0]["message"]["content"] == ("The quick" if max_tokens else "")
    chunks = streamed(http, CHAT, **body, n=2)
    assert [entry for chunk in chunks for entry in chunk.get("prompt_logprobs", [])] == expected
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"][0]["index"] == 1]
    assert "".join(texts) == ("The quick" if max_tokens else "")


def test_a_reply_without_them_has_no_such_field(http: httpx.Client) -> None:
    assert "prompt_logprobs" not in asked(http, prompt="Hello")["choices"][0]
    assert "prompt_logprobs" not in asked(http, CHAT, messages=HELLO)


def test_texts_that_look_like_fields_stay_texts(face: Any, http: httpx.Client) -> None:
    text = 'a "logprobs":null, "choices":null and "prompt_logprobs":null'
    (choice,) = asked(http, prompt=text, echo=True, logprobs=1, max_tokens=0, prompt_logprobs=1)["choices"]
    assert choice["text"] == text and len(choice["logprobs"]["tokens"]) == len(choice["prompt_logprobs"])


def test_a_prompt_of_hundreds_of_tokens_is_streamed_in_parts(face: Any, http: httpx.Client) -> None:
    token_ids = [30 + index % 300 for index in range(500)]
    body = {"prompt": token_ids, "echo": True, "logprobs": 20, "max_tokens": 0}
    chunks = streamed(http, **body)
    assert max(len((chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]) for chunk in chunks) <= 128
    (choice,) = asked(http, **body)["choices"]
    assert joined(chunks)["logprobs"] == choice["logprobs"] and joined(chunks)["text"] == choice["text"]
    assert len(choice["logprobs"]["tokens"]) == 500


def test_a_token_that_can_t_be_has_a_number_that_json_can_spell() -> None:
    token = PromptToken(5, "x", -math.inf, 9, 0, 1, [Likely(6, "y", -math.inf)])
    assert legacy_part([token], 1, 1)["token_logprobs"] == [-9999.0]
    expected = {"5": {"rank": 9, "decoded_token": "x"}, "6": {"rank": 1, "decoded_token": "y"}}
    assert listed_part([token], 1) == [{key: {"logprob": -9999.0, **entry} for key, entry in expected.items()}]


def test_the_openai_client_reads_them(face: Any) -> None:
    with openai.OpenAI(base_url=f"{face.http}/v1", api_key="none", max_retries=0) as client:
        reply = client.completions.create(model="chatty", prompt="Hello", max_tokens=0, echo=True, logprobs=2)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.tokens is not None
        assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(face.tokenizer.encode("Hello"))
