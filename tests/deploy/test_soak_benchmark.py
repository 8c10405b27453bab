"""What the soak makes of what it saw: wrong tokens, failures that a replay should have hidden, growth, tracebacks. No cluster here."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
import torch

from halfmoon.kernels.reference.philox import uniform
from halfmoon.kernels.sampling import sampling


@pytest.mark.parametrize(
    ("found", "whole", "is_right"),
    [
        ((5, 6, 7), True, True),
        ((5, 6), True, False),  # lost
        ((5, 6, 6, 7), True, False),  # repeated
        ((5, 8, 7), True, False),
        ((5, 6), False, True),  # its client left
        ((), False, True),
        ((6,), False, False),
        ((5, 6, 7, 8), False, False),
    ],
)
async def test_tokens_are_right_if_they_are_the_answer_or_of_a_client_that_left_its_beginning(
    load: Any, found: tuple[int, ...], whole: bool, is_right: bool
) -> None:
    clients, cases = load("soak_clients"), load("known_answers")
    case = cases.Case((1, 2), (5, 6, 7), "abc", None)
    running = clients.Load("127.0.0.1:1", "127.0.0.1:1", [case], (), 0.0, random.Random(0))
    running._check(case, found, "grpc", whole=whole)
    running._check_text(case, "abcd"[: len(found)] if is_right else "xyz", "sse", whole=whole)
    assert len(running.wrong) == (0 if is_right else 2)
    async with running.running(0):
        pass


def test_a_failure_is_excused_beside_a_killed_proxy_or_where_each_of_its_attempts_was_lost_to_a_fault(load: Any) -> None:
    soak, clients = load("soak"), load("soak_clients")
    windows = [
        soak.Window("kill decode", 10.0, 10.1),
        soak.Window("stop store", 12.0, 15.0),
        soak.Window("wedge prefill", 14.0, 16.0),
        soak.Window("kill proxy", 30.0, 36.0),
    ]
    failures = [
        clients.Failure(1.0, 9.0, "before all"),
        clients.Failure(9.5, 13.0, "beside two"),
        clients.Failure(9.5, 14.5, "beside three, gone (attempt 3 of 3)"),
        clients.Failure(9.5, 14.5, "beside three, gone (attempt 2 of 3)"),
        clients.Failure(35.0, 38.0, "beside the proxy's"),
        clients.Failure(37.0, 38.0, "after all"),
    ]
    found = soak.unexplained(failures, windows)
    assert [one.rpartition(" (")[0] for one in found] == ["before all", "beside two", "beside three, gone (attempt 2 of 3)", "after all"]
    assert "beside kill decode, stop store" in found[1] and "beside no fault" in found[3]


def test_what_a_process_holds_may_not_grow_unless_it_is_another_one(load: Any) -> None:
    soak = load("soak")

    def process(pid: int, num_fds: int, rss_mib: float) -> Any:
        return soak.Process(pid, num_fds, rss_mib)

    first = {"proxy": process(1, 70, 150.0), "decode-0": process(2, 60, 400.0), "store-0": process(3, 60, 140.0)}
    last = {"proxy": process(1, 71, 400.0), "decode-0": process(2, 99, 900.0), "store-0": process(9, 600, 900.0)}
    assert soak.growth([first, first]) == []
    assert soak.growth([first, last]) == ["proxy: 150.0 MiB, then 400.0", "decode-0: 60 descriptors, then 99"]


def test_of_a_log_each_traceback_gives_what_was_raised(load: Any) -> None:
    log = (
        "2026-11-28 INFO all is well\nTraceback (most recent call last):\n  File ...\n    raise error\nValueError: 3\n\nThe above ...\n"
        "\nTraceback (most recent call last):\n  File ...\nStoreUnavailable: store at 127.0.0.2:40535\nINFO ValueError: none\n"
    )
    assert load("faulty_cluster").last_lines(log.splitlines()) == ["ValueError: 3", "StoreUnavailable: store at 127.0.0.2:#"]


def test_a_known_token_is_the_samplers_and_none_where_rounding_could_make_it_another(load: Any) -> None:
    cases = load("known_answers")
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1))
    for seed in range(50):
        columns = [torch.tensor([value]) for value in (1.0, 0, 1.0, 0.0, seed, 7)]
        assert cases.drawn(logits, seed, 7) == int(sampling(logits.unsqueeze(0), *columns))
    assert cases.greedy(logits) == int(logits.argmax())
    assert cases.greedy(torch.tensor([1.0, 1.0 - 1e-4, 0.0])) is None
    draw = float(uniform(np.array([3], np.uint64), np.array([0], np.uint64))[0])
    at_the_border = torch.tensor([draw, 1.0 - draw], dtype=torch.float64).log()
    assert cases.drawn(at_the_border, 3, 0) is None


async def test_clients_that_are_paused_have_all_been_answered(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = load("soak_clients")
    running = clients.Load("127.0.0.1:1", "127.0.0.1:1", [], (), 0.0, random.Random(0))
    under_way, most, gate = 0, 0, asyncio.Event()

    async def request(client: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        await asyncio.sleep(0)
        under_way -= 1

    monkeypatch.setattr(running, "_request", request)
    async with running.running(3):
        while most < 3:
            await asyncio.sleep(0)
        pausing = asyncio.create_task(running.paused())
        await asyncio.sleep(0)
        assert not pausing.done()
        gate.set()
        await pausing
        assert under_way == 0
