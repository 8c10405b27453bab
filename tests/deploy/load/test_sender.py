"""One request against a server whose moments are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from halfmoon.deploy.load.sample import Sample
from halfmoon.deploy.load.sender import SendOptions
from halfmoon.protocol.errors import ConfigError


async def send(fake: Any, sender_to: Any, request: Any, script: Any, *, leaves: bool = False, **options: Any) -> tuple[Sample, Any]:
    """leaves: the client closes the connection, and the server is asked whether it saw that."""
    async with fake.FakeServer(lambda body: script) as server, sender_to(server.url, **options) as sender:
        sample = await sender.send(request, sender.body(request), 0, 0.0)
        async with asyncio.timeout(60 if leaves else None):
            while leaves and not server.seen[0].left:
                await asyncio.sleep(0.01)
        return sample, server


async def undisturbed(measure: Callable[[], Awaitable[dict[str, float]]], rel: float) -> None:
    """What was measured over what is true, by name: within rel of 1 in one of ten runs. Other work of the machine spoils some of them."""
    runs: list[dict[str, float]] = []
    while not runs or any(abs(ratio - 1.0) > rel for ratio in runs[-1].values()):
        assert len(runs) < 10, runs
        runs.append(await measure())


@pytest.mark.parametrize("cut", [0, 1, 7])
@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_ttft_and_gaps_are_those_at_which_the_server_wrote(fake, sender_to, request_of, cut: int, api: str) -> None:
    script = fake.Script([0.15, 0.20, 0.40, 0.45, 0.75], cut=cut)
    options = {"api": api, "prompts": "text" if api == "chat" else "tokens"}

    async def measure() -> dict[str, float]:
        sample, server = await send(fake, sender_to, request_of(num_output=5), script, **options)
        assert sample.outcome == "ok" and sample.completion_tokens == 5 and len(sample.arrivals_s) == 5
        (seen,) = server.seen
        longest = max(range(4), key=lambda number: sample.gaps_s[number])
        return {
            "ttft": sample.ttft_s / (seen.written[0] - seen.read),
            "all gaps": (sample.arrivals_s[-1] - sample.arrivals_s[0]) / (seen.written[-1] - seen.written[0]),
            "the longest gap": sample.gaps_s[longest] / (seen.written[longest + 1] - seen.written[longest]),
        }

    await undisturbed(measure, rel=0.1)


async def test_chunks_of_several_tokens_keep_the_servers_total(fake, sender_to, request_of) -> None:
    script = fake.Script([0.1, 0.3, 0.5], tokens=[1, 4, 2], num_cached=3)

    async def measure() -> dict[str, float]:
        sample, server = await send(fake, sender_to, request_of(num_output=7), script)
        written = server.seen[0].written
        assert (sample.num_tokens, len(sample.arrivals_s), len(sample.gaps_s), sample.cached_tokens) == (7, 3, 6, 3)
        assert sorted(sample.gaps_s)[:4] == [0.0] * 4
        return {"tpot": sample.tpot_s / ((written[-1] - written[0]) / 6)}

    await undisturbed(measure, rel=0.1)


async def test_the_body_asks_for_what_was_planned(fake, sender_to, request_of) -> None:
    request = request_of(num_input=12, num_output=1)
    options = {"api_key": "k", "extra_body": {"min_tokens": 1, "temperature": 0.5}}
    _, server = await send(fake, sender_to, request, fake.Script([0.0]), **options)
    (seen,) = server.seen
    assert seen.body["prompt"] == request.token_ids.tolist() and seen.body["max_tokens"] == 1
    assert (seen.body["ignore_eos"], seen.body["min_tokens"], seen.body["temperature"]) == (True, 1, 0.5)
    assert seen.headers["authorization"] == "Bearer k" and seen.headers["x-request-id"] == "test-0"


async def test_a_429_is_refused_with_its_retry_after_and_is_not_sent_again(fake, sender_to, request_of) -> None:
    script = fake.Script(status=429, headers={"retry-after": "7"}, body={"error": {"message": "full", "code": "overloaded"}})
    sample, server = await send(fake, sender_to, request_of(), script)
    assert (sample.outcome, sample.retry_after_s, sample.status) == ("refused", 7.0, 429)
    assert sample.error == "429: overloaded: full" and len(server.seen) == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"status": 500, "body": {"error": {"message": "bad", "code": "internal_error"}}}, "500: internal_error: bad"),
        ({"moments": [0.0, 0.01, 0.02], "error_at": 2}, "internal_error: the engine fell over"),
        ({"moments": [0.0, 0.01, 0.02], "break_at": 2}, "ClientPayloadError"),
        ({"moments": []}, "without a token"),
    ],
)
async def test_what_goes_wrong_is_an_error_with_its_text(fake, sender_to, request_of, values: dict[str, Any], told: str) -> None:
    sample, _ = await send(fake, sender_to, request_of(), fake.Script(**values))
    assert sample.outcome == "error" and told in sample.error


async def test_nobody_there_is_an_error_and_no_exception(sender_to, request_of) -> None:
    async with sender_to("127.0.0.1:9") as sender:
        sample = await sender.send(request_of(), b"{}", 0, 0.0)
    assert sample.outcome == "error" and "Connect" in sample.error


async def test_a_request_that_is_not_over_in_time_is_timed_out_and_its_connection_closed(fake, sender_to, request_of) -> None:
    began = time.perf_counter()
    sample, _ = await send(fake, sender_to, request_of(), fake.Script([0.0, 0.0, 0.0], hang_at=2), leaves=True, timeout_s=1.0)
    elapsed_s = time.perf_counter() - began
    assert sample.outcome == "timed_out" and len(sample.arrivals_s) == 2
    assert 0.99 < sample.e2e_s < elapsed_s


async def test_a_client_that_leaves_half_way_is_cancelled_and_the_server_sees_it_go(fake, sender_to, request_of) -> None:
    script = fake.Script([0.0, 0.01, 0.02, 0.03], hang_at=3)
    sample, _ = await send(fake, sender_to, request_of(cancel_after=2), script, leaves=True)
    assert sample.outcome == "cancelled" and 2 <= len(sample.arrivals_s) <= 3


async def test_an_answer_that_ends_before_its_client_would_leave_is_ok(fake, sender_to, request_of) -> None:
    sample, _ = await send(fake, sender_to, request_of(cancel_after=9), fake.Script([0.0, 0.01]))
    assert sample.outcome == "ok"


def test_chat_with_token_ids_is_told_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="text"):
        SendOptions(model="m", api="chat", prompts="tokens")
