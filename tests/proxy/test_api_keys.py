"""API keys at both faces: who is let in, as whom, how much, and that nothing of a request or a key is left anywhere."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from halfmoon.client import Client, Overloaded, PermissionDenied, RequestCancelled, Unauthenticated
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.proxy.tenants.keys_file import KeysFile

SECRET_WORDS = "zebra moonquake quicksilver"


class Keys:
    """A file of keys and the proxy that asks for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = KeysFile({}, {})

    def add(self, tenant: str, **limits: int) -> str:
        self.file, key = self.file.with_key(tenant, limits)
        self.file.save(self.path)
        return key

    def revoke(self, key: str) -> None:
        self.file = self.file.without_key(key.split("-")[1])
        self.file.save(self.path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def shared(keys: Keys, make_face: Callable[..., Any]) -> Any:
    keys.add("first")
    return make_face(keys_file=str(keys.path), order="fcfs")


@pytest.fixture
def face(shared: Any) -> Iterator[Any]:
    shared.reset()
    yield shared
    shared.open_gate()


def post(face: Any, key: str = "", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{face.http}/v1/completions", json={"prompt": "Hello", "max_tokens": 3, **body}, headers=headers)


def test_without_a_key_or_with_a_wrong_one_nothing_of_v1_answers_and_the_rest_does(face: Any, keys: Keys) -> None:
    key = keys.add("acme")
    for wrong in ("", "x", key[:-1], key + "x", key.upper(), "hm-00000000-" + "A" * 43):
        reply = post(face, wrong)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthenticated"), wrong
        assert reply.headers["www-authenticate"] == "Bearer" and (not wrong or wrong == "x" or wrong not in reply.text)
        for path in ("/v1/models", "/v1/models/chatty", "/v1/none", "/v1"):
            headers = {"authorization": f"Bearer {wrong}"} if wrong else {}
            assert httpx.get(f"{face.http}{path}", headers=headers).status_code == 401
        with Client(face.grpc, api_key=wrong) as client:
            for call in (lambda: client.generate(prompt="x"), client.models, lambda: client.cancel("x")):
                with pytest.raises(Unauthenticated):
                    call()
    assert httpx.get(f"{face.http}/v1/models", headers={"authorization": f"Basic {key}"}).status_code == 401
    assert face.workers.requests == []
    assert httpx.get(f"{face.http}/health").status_code == httpx.get(f"{face.http}/ready").status_code == 200
    assert post(face, key).status_code == 200
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{face.http}/v1", api_key="wrong", max_retries=0) as wrong_client,
    ):
        wrong_client.models.list()
    with openai.OpenAI(base_url=f"{face.http}/v1", api_key=key) as right:
        assert right.models.list().data[0].id == "chatty"


def test_the_page_tells_a_stranger_nothing_and_a_tenant_nothing_of_others_requests(face: Any, keys: Keys) -> None:
    key = keys.add("acme")
    assert post(face, keys.add("other")).status_code == 200
    assert httpx.get(face.http).status_code == 200
    for headers in ({}, {"authorization": "Bearer other"}):
        refused = httpx.get(f"{face.http}/page/state", headers=headers)
        assert refused.status_code == 401 and "members" not in refused.text
    state = httpx.get(f"{face.http}/page/state", headers={"authorization": f"Bearer {key}"}).json()
    assert state["members"] and (state["under_way"], state["ended"]) == ([], [])


def test_a_body_is_not_read_for_a_stranger(face: Any) -> None:
    host, port = face.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_key_works_from_its_making_on_and_not_after_it_is_revoked(face: Any, keys: Keys) -> None:
    key, other = keys.add("late"), keys.add("late")
    with Client(face.grpc, api_key=key) as client:
        assert post(face, key).status_code == 200 and client.generate(prompt="x", max_tokens=2).token_ids
        keys.revoke(key)
        assert post(face, key).status_code == 401
        with pytest.raises(Unauthenticated, match="was revoked"):
            client.generate(prompt="x")
    assert post(face, other).status_code == 200


def test_a_file_that_is_broken_while_it_serves_changes_nothing_and_is_told_once(
    face: Any, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.add("steady")
    assert post(face, key).status_code == 200
    text = keys.path.read_text()
    keys.path.write_text("{")
    with caplog.at_level(logging.ERROR):
        assert [post(face, key).status_code for _ in range(3)] == [200] * 3
    assert caplog.text.count("the API keys stay as they were") == 1
    keys.path.write_text(text)


def test_two_tenants_have_no_block_key_in_common_and_each_has_the_same_again(face: Any, keys: Keys, faces: Any) -> None:
    prompt = [7] * 40
    for key in (keys.add("a"), keys.add("b"), keys.add("a")):
        assert post(face, key, prompt=prompt).status_code == 200
    first, other, again = face.workers.requests
    schema = faces.FACE_SCHEMA
    for sequence, tenant in ((first, "a"), (other, "b"), (again, "a")):
        root = root_key(schema.fingerprint, salt=bytes.fromhex(keys.file.tenants[tenant].salt))
        assert sequence.root == root and list(sequence.block_keys) == block_keys(root, prompt, schema.block_size)
    assert not set(first.block_keys) & set(other.block_keys) and list(first.block_keys) == list(again.block_keys)
    plain = block_keys(root_key(schema.fingerprint), prompt, schema.block_size)
    assert not set(plain) & {*first.block_keys, *other.block_keys}


def test_limits_are_429_with_the_time_to_come_back_for_their_tenant_alone(face: Any, keys: Keys) -> None:
    small, free = keys.add("small", requests_per_minute=2), keys.add("free")
    assert [post(face, small).status_code for _ in range(2)] == [200, 200]
    reply = post(face, small)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limited")
    assert 1 <= int(reply.headers["retry-after"]) <= 30
    with Client(face.grpc, api_key=small) as client, pytest.raises(Overloaded, match="2 requests a minute") as caught:
        client.generate(prompt="x")
    assert 0 < caught.value.retry_after_s <= 30
    assert post(face, free).status_code == 200
    tokens = keys.add("words", tokens_per_minute=20)
    assert post(face, tokens, prompt=[7] * 10, max_tokens=16, ignore_eos=True).status_code == 200
    assert post(face, tokens).json()["error"]["message"].startswith("the limit of 20 tokens a minute")


def test_a_quota_that_is_used_up_is_429_until_its_period_ends_and_is_told_in_metrics(face: Any, keys: Keys) -> None:
    key = keys.add("thrifty", tokens_per_day=20)
    assert post(face, key, prompt=[7] * 10, max_tokens=16, ignore_eos=True).status_code == 200
    reply = post(face, key)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "quota_exceeded")
    assert reply.json()["error"]["message"].startswith("the quota of 20 tokens a day is used up")
    assert 1 <= int(reply.headers["retry-after"]) <= 86400
    with Client(face.grpc, api_key=key) as client, pytest.raises(Overloaded, match="20 tokens a day"):
        client.generate(prompt="x")
    keys.add("thrifty", tokens_per_day=1000)
    assert post(face, key).status_code == 200, "a quota that is raised holds from the next request on"
    assert 'halfmoon_refusals_total{code="quota_exceeded",face="http"' in metrics_of(face)


def metrics_of(face: Any) -> str:
    return httpx.get(f"{face.metrics}/metrics").text


def test_a_priority_beyond_the_key_s_is_403(face: Any, keys: Keys) -> None:
    plain, urgent = keys.add("plain"), keys.add("urgent", first_priority=-2)
    reply = post(face, plain, priority=-1)
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["param"]) == (403, "permission_denied", "priority")
    assert post(face, urgent, priority=-2).status_code == 200 and post(face, plain, priority=1).status_code == 200
    with Client(face.grpc, api_key=plain) as client, pytest.raises(PermissionDenied):
        client.generate(prompt="x", priority=-1)


def test_a_request_is_cancelled_by_its_own_tenant_alone(face: Any, keys: Keys) -> None:
    mine, theirs = keys.add("mine"), keys.add("theirs")
    face.workers.gate_at = 2
    with Client(face.grpc, api_key=mine) as client, Client(face.grpc, api_key=theirs) as other, client.stream(prompt="Hello") as stream:
        next(stream)
        request_id = stream.request_id
        assert request_id is not None and not other.cancel(request_id)
        assert client.cancel(request_id)
        with pytest.raises(RequestCancelled):
            list(stream)


def test_no_prompt_answer_or_key_is_in_logs_metrics_or_errors(face: Any, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    """Of requests that are served, refused and broken, at both faces, with everything logged that can be."""
    key = keys.add("quiet")
    secret, answer = key.rsplit("-", 1)[1], face.tokenizer.decode(face.answer)
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        assert post(face, key, prompt=SECRET_WORDS, max_tokens=30).status_code == 200
        for body in ({"top_p": 7}, {"max_tokens": 10**6}, {"model": "other"}, {"stop": [""]}, {"n": 0}, {"top_q": 1}):
            refused = post(face, key, prompt=SECRET_WORDS, **body)
            assert 400 <= refused.status_code < 500
            texts += [refused.text, str(refused.headers)]
        texts.append(post(face, f"{key}x", prompt=SECRET_WORDS).text)
        face.workers.fail_at = {1: ValueError("the worker broke")}  # type: ignore[dict-item]
        texts.append(post(face, key, prompt=SECRET_WORDS).text)
        face.workers.fail_at = {}
        with Client(face.grpc, api_key=key, control=face.control) as client:
            client.generate(prompt=SECRET_WORDS, request_id="label")
            for options in ({"max_tokens": 10**6}, {"top_p": 7.0}):
                with pytest.raises(Exception) as caught:
                    client.generate(prompt=SECRET_WORDS, **options)  # type: ignore[arg-type]
                texts.append(str(caught.value))
            texts += [str(client.status()), str(client.explain("label"))]
    texts += [httpx.get(f"{face.metrics}{path}").text for path in ("/metrics", "/metrics/targets")]
    texts += [f"{record.getMessage()} {record.exc_text or ''} {record.__dict__}" for record in caplog.records]
    assert len(caplog.records) > 5, "something is logged"
    for text in texts:
        for word in (*SECRET_WORDS.split(), secret, answer, face.control.token, keys.file.tenants["quiet"].salt):
            assert word not in text, text
