"""proxy/page: the files, and the state that they read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.conductor.policies.base import RoleChange
from halfmoon.proxy.members.rebalancer import NotedChange
from halfmoon.proxy.page import routes, view
from halfmoon.proxy.page.routes import FILES, STATIC
from halfmoon.proxy.requests.router import Router

NAMES = ["queue", "prefill_queue", "prefix_load", "prefill", "handoff", "write"]
SECRET = "Hello quick brown fox"


@pytest.fixture(scope="module")
def http(shared_face: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_face.http, timeout=60) as client:
        yield client


def complete(http: httpx.Client, request_id: str = "", **fields: Any) -> httpx.Response:
    headers = {"x-request-id": request_id} if request_id else {}
    return http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 6, **fields}, headers=headers)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply of /page/state is made anew."""
    monkeypatch.setattr(routes, "REFRESH_S", 0.0)


# The files


def test_every_file_is_served_with_its_type_and_may_load_nothing_from_elsewhere(http: httpx.Client) -> None:
    assert sorted(path.name for path in STATIC.iterdir()) == sorted([*FILES, "index.html"])
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        reply = http.get(path)
        assert reply.status_code == 200 and len(reply.content) < 20_000
        policy = dict(rule.strip().split(" ", 1) for rule in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text)
        assert http.head(path).status_code == 200
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/page/page.js").headers["content-type"].startswith("text/javascript")


def test_the_page_names_only_files_that_there_are_and_nothing_is_written_inline(http: httpx.Client) -> None:
    page = http.get("/").text
    named = re.findall(r'(?:src|href)="/page/([^"]+)"', page)
    for name in FILES:
        named += re.findall(r'from "\./([^"]+)"', http.get(f"/page/{name}").text) if name.endswith(".js") else []
    assert set(named) == set(FILES)
    assert not re.search(r"<style|<script[^>]*>[^<]|\sstyle=|\son\w+=", page)


def test_every_element_that_a_script_asks_for_is_in_the_page(http: httpx.Client) -> None:
    page = http.get("/").text
    ids = set(re.findall(r'id="([^"]+)"', page))
    scripts = "".join(http.get(f"/page/{name}").text for name in FILES if name.endswith(".js"))
    asked = set(re.findall(r'byId\("([^"]+)"\)', scripts)) | {
        f"{name}-{part}" for name in ("ttft", "tpot") for part in ("chart", "figures")
    }
    assert asked <= ids and len(asked) > 10


def test_nothing_of_it_is_served_where_it_is_switched_off(make_face: Callable[..., Any]) -> None:
    face = make_face(page=False)
    for path in ("/", "/page/state", "/page/page.js"):
        assert httpx.get(face.http + path).status_code == 404


# The state


def test_a_finished_request_is_shown_with_its_phases(http: httpx.Client, face: Any, fresh: None) -> None:
    assert complete(http, "mine").status_code == 200
    found = next(one for one in http.get("/page/state").json()["ended"] if one["id"] == "mine")
    assert (found["state"], found["reason"], found["num_tokens"]) == ("done", "length", 6)
    assert (found["prefill"], found["decode"], found["num_attempts"]) == ("prefill-0", "decode-0", 1)
    assert found["num_prompt_tokens"] == len(face.tokenizer.encode(SECRET))
    assert found["phases"]["prefill"] == 0.75 and 0 < found["ttft_s"] <= found["e2e_s"]


def test_the_phases_of_a_first_token_add_up_to_its_time() -> None:
    record = common_pb2.PhaseRecord(
        queue_s=0.01, prefill_queue_s=0.02, prefix_load_s=0.03, prefill_s=0.2, push_s=0.15, handoff_wait_s=0.05, write_s=0.004, ttft_s=0.35
    )
    phases = view.to_first_token(record)
    assert sum(phases.values()) == pytest.approx(0.35) and list(phases) == NAMES
    assert phases["handoff"] == pytest.approx(0.35 - 0.004 - 0.26)
    waiting = view.to_first_token(common_pb2.PhaseRecord(queue_s=0.01))
    assert waiting == {**dict.fromkeys(NAMES, 0.0), "queue": 0.01}


def test_the_script_knows_the_phases_by_the_same_names() -> None:
    found = re.search(r"PHASES = \[(.*?)\];", (STATIC / "parts.js").read_text(), re.DOTALL)
    assert found is not None and re.findall(r'\["(\w+)",', found[1]) == NAMES
    styles = (STATIC / "page.css").read_text()
    assert all(f".{name} {{ background: var(--{name}); }}" in styles for name in NAMES)


def test_a_request_under_way_is_shown_as_such_and_counts_its_tokens(http: httpx.Client, face: Any, fresh: None) -> None:
    face.workers.gate_at = 2
    with http.stream("POST", "/v1/completions", json={"prompt": SECRET, "stream": True}, headers={"x-request-id": "held"}) as reply:
        lines = reply.iter_lines()
        assert [next(line for line in lines if line) for _ in range(2)]  # two tokens have come
        state = httpx.get(f"{face.http}/page/state").json()
        (held,) = state["under_way"]
        assert (held["id"], held["state"], held["num_tokens"], held["e2e_s"]) == ("held", "decode", 2, None)
        assert state["num_running"] == 1
        assert "held" not in [one["id"] for one in state["ended"]]
        face.open_gate()
        assert list(lines)
    state = http.get("/page/state").json()
    assert state["under_way"] == [] and state["ended"][0]["id"] == "held"


def test_neither_prompt_nor_answer_nor_the_words_of_an_error_are_in_it(http: httpx.Client, face: Any, fresh: None) -> None:
    face.workers.fail_at = {1: InvalidRequest(f"no good: {SECRET}")}
    assert complete(http, "bad").status_code == 400
    face.reset()
    assert complete(http).status_code == 200
    text = http.get("/page/state").text
    assert SECRET not in text and "quick" not in text
    bad = next(one for one in json.loads(text)["ended"] if one["id"] == "bad")
    assert (bad["state"], bad["reason"]) == ("failed", "invalid_request")


def test_members_are_shown_with_their_load_and_the_last_minutes_with_verdicts(http: httpx.Client, face: Any, fresh: None) -> None:
    before = http.get("/page/state").json()
    assert complete(http).status_code == 200
    state = http.get("/page/state").json()
    assert [(one["id"], one["role"], one["avoided"]) for one in state["members"]] == [
        ("decode-0", "decode", False),
        ("prefill-0", "prefill", False),
        ("store-0", "store", False),
    ]
    assert {(one["num_running"], one["num_waiting"], one["kv_used"]) for one in state["members"]} == {(1, 2, 0.25)}
    assert sum(row[4] for row in state["bins"]) == sum(row[4] for row in before["bins"]) + 1
    assert any(row[0] is not None and row[2] is not None for row in state["bins"])
    assert (state["slo"], state["takes_chats"], state["missing"]) == ({"ttft_s": None, "tpot_s": None}, True, [])


def test_the_latest_changes_of_roles_are_shown_with_their_reason_and_a_failure_without_its_words(
    http: httpx.Client, face: Any, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = RoleChange("both-0", "prefill", "slo", "98% with, 60% without")
    noted = [NotedChange(change, "decode", time.monotonic() - 5.0, error) for error in (SECRET, "", "", "", "")]
    monkeypatch.setattr(Router, "role_changes", property(lambda _: noted))
    text = http.get("/page/state").text
    shown = json.loads(text)["role_changes"]
    assert SECRET not in text and [one["failed"] for one in shown] == [True, False, False, False]
    assert {(one["id"], one["role"], one["reason"]) for one in shown} == {("both-0", "prefill", "98% with, 60% without")}
    assert all(5.0 <= one["for_s"] for one in shown)


def test_it_shows_so_many_requests_and_no_more(http: httpx.Client, face: Any, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MAX_ENDED", 3)
    for number in range(5):
        complete(http, f"number-{number}", max_tokens=1)
    assert [one["id"] for one in http.get("/page/state").json()["ended"]] == ["number-4", "number-3", "number-2"]


def test_many_viewers_cost_one_view(http: httpx.Client, face: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []

    def counted(router: Any) -> dict[str, Any]:
        made.append(None)
        return view.view(router)

    monkeypatch.setattr(routes, "REFRESH_S", 3600.0)
    monkeypatch.setattr(routes, "view", counted)
    replies = {http.get("/page/state").content for _ in range(20)}
    assert len(replies) == 1 and len(made) <= 1
