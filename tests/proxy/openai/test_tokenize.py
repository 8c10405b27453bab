"""/tokenize, /detokenize, /version and /ping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from halfmoon.protocol.version import package_version
from halfmoon.proxy.openai.tokenize import PART_TOKENS, tokenized_json

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def http(shared_face: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_face.http, timeout=60) as client:
        yield client


def posted(http: httpx.Client, path: str, status: int = 200, **body: Any) -> Any:
    reply = http.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json() if status == 200 else reply.json()["error"]


def test_a_text_has_the_tokens_that_a_completion_of_it_has(face: Any, http: httpx.Client) -> None:
    text = "The quick brown fox, 日本語"
    found = posted(http, "/tokenize", prompt=text)
    assert found == {"count": len(found["tokens"]), "max_model_len": 512, "tokens": face.tokenizer.encode(text), "token_strs": None}
    posted(http, "/v1/completions", prompt=text, max_tokens=1)
    assert list(face.workers.requests[-1].token_ids) == found["tokens"]
    bare = posted(http, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True, model="chatty")
    assert bare["tokens"] == found["tokens"][1:] and "".join(bare["token_strs"][:5]) == text[: len("".join(bare["token_strs"][:5]))]


def test_a_chat_has_the_tokens_that_it_is_answered_by(face: Any, http: httpx.Client) -> None:
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        found = posted(http, "/tokenize", messages=HELLO, **fields)
        posted(http, "/v1/chat/completions", messages=HELLO, max_tokens=1, **fields)
        assert found["tokens"] == list(face.workers.requests[-1].token_ids)
    begun = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "The"}]}]
    continued = posted(http, "/tokenize", messages=begun, continue_final_message=True)["tokens"]
    assert face.tokenizer.decode(continued, skip_special_tokens=False).endswith("<|im_start|>assistant\nThe")


def test_tokens_have_their_text_special_ones_included(face: Any, http: httpx.Client) -> None:
    for num_copies in (1, 1000):  # the second one is decoded in a thread
        token_ids = face.tokenizer.encode("Hello 😀") * num_copies
        assert posted(http, "/detokenize", tokens=token_ids) == {"prompt": "<s>Hello 😀" * num_copies}
    assert posted(http, "/detokenize", tokens=[]) == {"prompt": ""}


def test_bodies_of_any_size_are_read(face: Any, http: httpx.Client) -> None:
    """Above 256 KiB another process parses them."""
    text = "The quick brown fox " * 15_000
    assert posted(http, "/tokenize", 400, prompt=text)["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": text}]
    error = posted(http, "/tokenize", 400, messages=messages)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    token_ids = face.tokenizer.encode(text, add_special_tokens=False)
    assert posted(http, "/detokenize", tokens=token_ids) == {"prompt": text} and len(token_ids) > 50_000


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "send either a prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt", "send either a prompt or messages"),
        ("/tokenize", {"messages": []}, "messages", "messages is empty"),
        ("/tokenize", {"prompt": [5]}, "prompt", "prompt is .5.: input should be a valid string"),
        ("/tokenize", {"promt": "x"}, "promt", "not a known field; did you mean prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", "half a surrogate pair"),
        (
            "/tokenize",
            {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "exclude",
        ),
        ("/detokenize", {}, "tokens", "tokens is missing"),
        ("/detokenize", {"tokens": [5, 400]}, "tokens", "tokens has token id 400"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "tokens has token id -1"),
        ("/detokenize", {"tokens": "x"}, "tokens", "tokens is 'x'"),
    ],
)
def test_what_is_wrong_is_named(path: str, body: dict[str, Any], param: str, words: str, http: httpx.Client) -> None:
    reply = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param
    assert words.replace(".5.", "[5]") in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(path: str, http: httpx.Client) -> None:
    body = {"prompt": "x"} if path == "/tokenize" else {"tokens": [5]}
    assert posted(http, path, 404, model="other", **body)["code"] == "model_not_found"


async def test_a_long_reply_is_made_while_the_event_loop_turns(face: Any) -> None:
    token_ids, turns = [5 + index % 300 for index in range(10 * PART_TOKENS + 1)], 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    reply = json.loads(b"".join(await tokenized_json(face.tokenizer, token_ids, 9, with_texts=True)))
    beside.cancel()
    assert turns >= 10 and reply["tokens"] == token_ids
    assert reply["token_strs"] == [face.tokenizer.token_text(token_id) for token_id in token_ids]


def test_the_version_and_a_ping(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": package_version()}
    assert http.get("/ping").status_code == http.post("/ping").status_code == http.head("/ping").status_code == 200
