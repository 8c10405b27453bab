"""Every row of proxy/openai/conformance.py is true, every published field has one, and the page is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai.types.chat.completion_create_params as chat
import openai.types.completion_create_params as completions
import pytest
from openai.types.chat import ChatCompletionStreamOptionsParam

from halfmoon.protocol.config import ModelOptions
from halfmoon.proxy.conductor.queue_order import CLASS_S, TICKS_PER_S
from halfmoon.proxy.openai import conformance
from halfmoon.proxy.openai.conformance import HALFMOON, OPENAI, VLLM, Row
from halfmoon.proxy.openai.types import ChatBody, CompletionBody
from halfmoon.proxy.text.chat_template import ChatTemplate
from halfmoon.proxy.text.tokenizer import Tokenizer

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
TEMPLATE = "{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ add_generation_prompt }}|{{ tools }}"
BASE: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "Hello", "seed": 1},
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "seed": 1},
}
CASES = [(route, row) for row in (*OPENAI, *VLLM, *HALFMOON) for route in PATHS if row.route in ("both", route)]
OF_A_REQUEST = ("id", "created", "halfmoon")


@pytest.fixture(scope="module")
def server(make_face: Callable[..., Any], chat_model_folder: Path, chat_tokenizer: Any) -> Any:
    return make_face(chat_model_folder, chat_tokenizer, ModelOptions(tool_parser="hermes"))


@pytest.fixture
def face(server: Any) -> Any:
    server.reset()
    return server


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, timeout=60) as client:
        yield client


def with_field(body: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    head, _, tail = name.partition(".")
    return {**body, head: {**body[head], tail: value} if tail else value}


def told(reply: httpx.Response) -> tuple[str, list[str]]:
    """The text, and what else the reply says, whatever steps a stream came in."""
    text, parts = "", set[str]()
    for line in reply.text.split("\n\n"):
        if line and line != "data: [DONE]":
            part = json.loads(line.removeprefix("data: "))
            for choice in part["choices"]:
                place, name = (choice, "text") if "text" in choice else (choice.get("delta", choice.get("message")), "content")
                text += place.pop(name, "")
            parts.add(json.dumps({name: part[name] for name in part if name not in OF_A_REQUEST}))
    return text, sorted(parts)


def seen(face: Any, http: httpx.Client, route: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """What the client and what the workers get, without what every request has of its own."""
    face.workers.requests.clear()
    reply = http.post(PATHS[route], json=body)
    assert reply.status_code == 200, reply.text
    asked: list[Any] = []
    for sequence in face.workers.requests:
        priority, is_soon = round(sequence.queue_order / (CLASS_S * TICKS_PER_S)), sequence.deadline_s < 100
        asked.append((list(sequence.token_ids), sequence.sampling, sequence.root, sequence.tpot_slo_s, priority, is_soon))
    return told(reply), sorted(asked, key=lambda one: one[1].seed)


@pytest.mark.parametrize(("route", "row"), CASES, ids=[f"{route}-{row.name}-{row.standing}" for route, row in CASES])
def test_a_field_is_what_its_row_says(route: str, row: Row, face: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", ChatTemplate(TEMPLATE, {}))
    face.workers.script = lambda sequence: [*face.answer[:6], 2, *face.answer[6:8], 1]  # 2 is a special token
    without = {**BASE[route], **row.beside}
    body = with_field(without, row.name, row.value)
    if row.standing == "refused":
        reply = http.post(PATHS[route], json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == row.name, reply.text
        return
    changes = seen(face, http, route, body) != seen(face, http, route, without)
    assert changes == (row.standing == "served") or row.name == "model"


@pytest.mark.parametrize("route", PATHS)
def test_another_model_is_refused(route: str, http: httpx.Client) -> None:
    assert http.post(PATHS[route], json={**BASE[route], "model": "other"}).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("route", "params"), [("completions", completions), ("chat", chat)])
def test_every_field_that_openai_publishes_has_a_row_and_no_row_is_of_another(route: str, params: Any) -> None:
    published = {*params.CompletionCreateParamsBase.__annotations__, *params.CompletionCreateParamsStreaming.__annotations__}
    published |= {f"stream_options.{name}" for name in ChatCompletionStreamOptionsParam.__annotations__}
    assert {row.name for row in OPENAI if row.route in ("both", route)} == published


@pytest.mark.parametrize(("route", "body"), [("completions", CompletionBody), ("chat", ChatBody)])
def test_every_field_that_the_body_takes_has_one_row(route: str, body: Any) -> None:
    names = [row.name for found, row in CASES if found == route]
    assert len(names) == len(set(names)) and body.model_fields.keys() <= set(names)


def test_the_page_is_made_from_the_table() -> None:
    assert conformance.PAGE.read_text() == conformance.page(), "run python -m halfmoon.proxy.openai.conformance"
