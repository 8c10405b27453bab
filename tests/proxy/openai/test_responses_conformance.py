"""Every row of the tables of /v1/responses is true, and every published field has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai.types.responses.response_create_params as params
import pytest

from halfmoon.protocol.config import ModelOptions
from halfmoon.proxy.conductor.queue_order import CLASS_S, TICKS_PER_S
from halfmoon.proxy.openai.conformance import RESPONSES, RESPONSES_EXTENSIONS, Row
from halfmoon.proxy.openai.responses_body import ResponsesBody
from halfmoon.proxy.text.chat_template import ChatTemplate
from halfmoon.proxy.text.tokenizer import Tokenizer

TEMPLATE = "{{ messages[0].content }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ tools }}"
BASE: dict[str, Any] = {"input": "Hello", "seed": 1}
ROWS = (*RESPONSES, *RESPONSES_EXTENSIONS)
OF_A_REQUEST = ("id", "created_at", "completed_at", "halfmoon", "output")


@pytest.fixture(scope="module")
def server(make_face: Callable[..., Any], chat_model_folder: Path, chat_tokenizer: Any) -> Any:
    return make_face(chat_model_folder, chat_tokenizer, ModelOptions(tool_parser="hermes"))


@pytest.fixture
def face(server: Any) -> Any:
    server.reset()
    return server


def seen(face: Any, body: dict[str, Any]) -> tuple[Any, Any]:
    """What the client and what the workers get, without what every request has of its own."""
    face.workers.requests.clear()
    reply = httpx.post(f"{face.http}/v1/responses", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    (sequence,) = face.workers.requests
    priority, is_soon = round(sequence.queue_order / (CLASS_S * TICKS_PER_S)), sequence.deadline_s < 100
    asked = (list(sequence.token_ids), sequence.sampling, sequence.root, sequence.tpot_slo_s, priority, is_soon)
    if body.get("stream"):
        return "events", asked
    found = reply.json()
    texts = [item.get("content") for item in found["output"]]
    return [json.dumps({name: found[name] for name in found if name not in OF_A_REQUEST}), texts], asked


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.name}-{row.standing}" for row in ROWS])
def test_a_field_is_what_its_row_says(row: Row, face: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", ChatTemplate(TEMPLATE, {}))
    without = {**BASE, **row.beside}
    body = {**without, row.name: row.value}
    if row.standing == "refused":
        reply = httpx.post(f"{face.http}/v1/responses", json=body, timeout=60)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == row.name, reply.text
        return
    changes = seen(face, body) != seen(face, without)
    assert changes == (row.standing == "served") or row.name == "model"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("store", False), ("background", False), ("truncation", "disabled"), ("top_logprobs", 0), ("conversation", None)],
        *[("include", []), ("include", ["reasoning.encrypted_content"])],
    ],
)
def test_a_value_that_asks_for_nothing_is_taken(name: str, value: Any, face: Any) -> None:
    assert seen(face, {**BASE, name: value}) == seen(face, BASE)


def test_every_field_that_openai_publishes_has_a_row_and_no_row_is_of_another() -> None:
    published = {*params.ResponseCreateParamsBase.__annotations__, *params.ResponseCreateParamsStreaming.__annotations__}
    assert {row.name for row in RESPONSES} == published and len(RESPONSES) == len(published)


def test_every_field_that_the_body_takes_has_one_row() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) and ResponsesBody.model_fields.keys() <= set(names)
