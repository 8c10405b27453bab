"""An SLO on its way in, by HTTP, gRPC and SDK, and a refusal for it on its way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from halfmoon.client import Client, InvalidRequest, Overloaded
from halfmoon.proxy.conductor.predictors import Predictors

COMPLETIONS = {"prompt": "Hello", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def strict(faces: Any, chat_model_folder: Any, chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A proxy that admits by predictions; its workers are so fast that only an absurd SLO is missed."""
    profile = tmp_path_factory.mktemp("profile") / "profile.json"
    Predictors.guess().model.save(profile)
    config = {"admission": "ttft_tbt", "ttft_slo_s": 100.0, "order": "edf", "policy": "kvcache_centric", "cost_model": str(profile)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfmoon.proxy.requests.placer.PROBE_S", 1e9)
        face = faces.Face(chat_model_folder, chat_tokenizer, **config)
        yield face
        face.stop()


@pytest.fixture
def sdk(strict: Any) -> Iterator[Client]:
    with Client(strict.grpc, control=strict.control) as client:
        yield client


@pytest.mark.parametrize(("route", "body"), [("completions", COMPLETIONS), ("chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_predicted_to_miss_its_slo_is_429_with_the_time_to_come_back(
    strict: Any, route: str, body: dict[str, Any], stream: bool
) -> None:
    reply = httpx.post(f"{strict.http}/v1/{route}", json={**body, "stream": stream, "slo": {"ttft": 1e-7}})
    error = reply.json()["error"]
    assert reply.status_code == 429 and (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    predicted = re.search(r"the first token is predicted in ([\d.]+) s, the SLO is 1e-07 s; come back in", error["message"])
    assert predicted is not None
    assert int(reply.headers["retry-after"]) == max(1, -(-int(reply.headers["retry-after-ms"]) // 1000))
    assert "x-request-id" in reply.headers


def test_a_step_over_the_slo_is_refused_and_one_within_is_served(strict: Any) -> None:
    refused = httpx.post(f"{strict.http}/v1/completions", json={**COMPLETIONS, "slo": {"tpot": 1e-6}})
    assert refused.status_code == 429 and "decode would step in" in refused.json()["error"]["message"]
    served = httpx.post(f"{strict.http}/v1/completions", json={**COMPLETIONS, "slo": {"tpot": 50.0, "ttft": None}, "priority": -1})
    (phases,) = served.json()["halfmoon"]["phases"]
    assert served.status_code == 200 and phases["predicted_ttft_s"] > 0 and phases["predicted_tpot_s"] > 0
    assert phases["placement_reason"].startswith("kvcache_centric: prefill-0")


@pytest.mark.parametrize(
    ("slo", "param", "message"),
    [
        ({"ttft": 0}, "slo.ttft", r"slo\.ttft is 0\.0; it must be a number of seconds above 0"),
        ({"tpot": -1.5}, "slo.tpot", r"slo\.tpot is -1\.5"),
        ({"ttft": 1e12}, "slo.ttft", "at most 604800"),
        ({"ttft": "1s"}, "slo.ttft", "slo.ttft is '1s'"),
        ({"tpt": 1}, "slo.tpt", "extra"),
        (3, "slo", "slo is 3"),
    ],
)
def test_a_wrong_slo_is_named(strict: Any, slo: Any, param: str, message: str) -> None:
    reply = httpx.post(f"{strict.http}/v1/completions", json={**COMPLETIONS, "slo": slo})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and re.search(message, error["message"], re.IGNORECASE), error


def test_the_sdk_carries_slo_and_priority_and_gets_the_refusal_typed(strict: Any, sdk: Client) -> None:
    strict.reset()
    with pytest.raises(Overloaded) as caught:
        sdk.generate(prompt="Hello", max_tokens=4, ttft_slo_s=1e-7)
    assert caught.value.fields["retry_after_s"] == caught.value.retry_after_s > 0
    done = [sdk.generate(prompt="Hello", max_tokens=4, ttft_slo_s=90.0, priority=priority) for priority in (0, -1)]
    first, urgent = strict.workers.requests[-2:]
    assert urgent.queue_order < first.queue_order, "a class is worth a minute"
    assert done[0].phases.predicted_ttft_s > 0 and done[0].phases.placement_reason
    with pytest.raises(InvalidRequest, match=r"tpot_slo_s is 0\.0"):
        sdk.generate(prompt="Hello", tpot_slo_s=0.0)


def test_status_tells_how_requests_are_scheduled_and_how_well_that_is_predicted(strict: Any, sdk: Client) -> None:
    sdk.generate(prompt="Hello", max_tokens=4)
    with pytest.raises(Overloaded):
        sdk.generate(prompt="Hello", max_tokens=4, ttft_slo_s=1e-7)
    status = sdk.status()
    assert (status.policy, status.admission, status.order) == ("kvcache_centric", "ttft_tbt", "edf")
    assert status.num_in_slo >= 1 and status.num_outside_slo == 0 and status.rejections["ttft_tbt"] >= 1
    assert status.prediction_errors.keys() >= {"ttft", "tpot"}


def test_a_request_is_explained_by_the_id_that_its_client_knows(strict: Any, sdk: Client) -> None:
    reply = httpx.post(f"{strict.http}/v1/completions", json={**COMPLETIONS, "n": 2}, headers={"x-request-id": "mine"})
    assert reply.status_code == 200
    ours = reply.json()["id"].removeprefix("cmpl-")
    assert [one.request_id for one in sdk.explain("mine")] == [one.request_id for one in sdk.explain(ours)] == [f"{ours}-0", f"{ours}-1"]
    assert all(one.state == "done" and one.attempts[0].prefill[0].chosen for one in sdk.explain("mine"))
    httpx.post(f"{strict.http}/v1/completions", json={**COMPLETIONS, "slo": {"ttft": 1e-7}}, headers={"x-request-id": "late"})
    (late,) = sdk.explain("late")
    assert late.state == "rejected" and late.attempts[0].rejection_code == "overloaded"
