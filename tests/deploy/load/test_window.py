"""An open loop: requests go out when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from halfmoon.deploy.load.balancer import make_balancer
from halfmoon.deploy.load.window import Progress, run_window


async def test_requests_go_out_when_they_are_due_though_none_has_been_answered(fake, sender_to, request_of) -> None:
    requests = [request_of(index=number, due_s=0.1 * number) for number in range(8)]
    all_sent = asyncio.Event()

    def notify(progress: Progress) -> None:
        if progress.num_sent == 8 and not progress.num_ended:
            all_sent.set()

    async with fake.FakeServer(lambda body: fake.Script([1.5, 1.6])) as server, sender_to(server.url) as sender:
        window = await run_window(requests, sender, make_balancer("round_robin", 1), notify)
    assert all_sent.is_set() and [sample.outcome for sample in window.samples] == ["ok"] * 8
    first, last = server.seen[0].read, server.seen[-1].read
    assert (last - first) / 0.7 == pytest.approx(1.0, rel=0.2)
    assert all(sample.late_s >= 0 for sample in window.samples) and window.lag.gaps_s


async def test_every_request_ends_in_one_class_and_the_samples_are_in_order(fake, sender_to, request_of) -> None:
    scripts = {
        100: fake.Script([0.0, 0.01]), 200: fake.Script(status=429, body={"error": {"message": "full"}}),
        300: fake.Script([0.0, 0.01], break_at=1), 400: fake.Script([0.0, 0.01, 0.02], hang_at=2), 500: fake.Script([0.0] * 9),
    }  # fmt: skip
    lens = [100, 200, 300, 400, 500] * 4
    requests = [request_of(index=n, num_input=length, cancel_after=3 if length == 500 else None) for n, length in enumerate(lens)]
    async with fake.FakeServer(lambda body: scripts[len(body["prompt"])]) as server, sender_to(server.url, timeout_s=3.0) as sender:
        window = await run_window(requests, sender, make_balancer("round_robin", 1))
    assert [sample.index for sample in window.samples] == list(range(20))
    expected = {100: "ok", 200: "refused", 300: "error", 400: "timed_out", 500: "cancelled"}
    assert [sample.outcome for sample in window.samples] == [expected[length] for length in lens]


async def test_several_endpoints_share_the_load(fake, sender_to, request_of) -> None:
    requests = [request_of(index=number) for number in range(6)]
    answer = fake.steady(0.0, 0.0)
    async with fake.FakeServer(answer) as one, fake.FakeServer(answer) as two, sender_to(one.url, two.url) as sender:
        window = await run_window(requests, sender, make_balancer("round_robin", 2))
    assert Counter(sample.endpoint for sample in window.samples) == {0: 3, 1: 3} and len(one.seen) == len(two.seen) == 3
