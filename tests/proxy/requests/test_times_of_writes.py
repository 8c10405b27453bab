"""A token's time is its write to the client, and what lies between decode's token and that write is a phase of its own."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest


async def test_a_first_token_that_waits_at_the_proxy_is_late_by_that(bench: Any, peers: Any) -> None:
    stream = bench.router.open(bench.request(max_tokens=3, slo=(0.2, None)))
    while not stream._runner.is_over:
        await asyncio.sleep(0.005)
    assert bench.sample("halfmoon_time_to_first_token_seconds_count") == 0, "nobody has read it"
    assert bench.metrics.outcomes == {}, "it is judged by what its client gets"
    await asyncio.sleep(0.25)
    _, finished = await peers.read(stream)
    record = finished.phases
    assert record.write_s >= 0.25 and record.ttft_s > record.write_s
    assert bench.sample("halfmoon_time_to_first_token_seconds_sum") == pytest.approx(record.ttft_s)
    assert bench.sample("halfmoon_request_phase_seconds_sum", phase="write") == pytest.approx(record.write_s)
    assert bench.sample("halfmoon_requests_total", outcome="done", in_slo="no", miss="ttft", **{"class": "own"}) == 1
    assert bench.sample("halfmoon_slo_requests_total", slo="ttft", met="no") == 1


async def test_who_never_reads_a_finished_answer_left_it(bench: Any) -> None:
    stream = bench.router.open(bench.request(max_tokens=3))
    while not stream._runner.is_over:
        await asyncio.sleep(0.005)
    await stream.aclose()
    assert bench.sample("halfmoon_requests_total", outcome="done", in_slo="unknown", miss="left") == 1
    assert bench.sample("halfmoon_e2e_request_latency_seconds_count") == 0


async def test_a_stream_that_is_collected_after_its_end_is_counted_too(bench: Any) -> None:
    stream = bench.router.open(bench.request(max_tokens=3))
    while not stream._runner.is_over:
        await asyncio.sleep(0.005)
    del stream
    gc.collect()
    await asyncio.sleep(0)
    assert bench.metrics.outcomes == {"done": 1}


async def test_a_refused_choice_is_a_request_that_was_not_served(make_bench: Any) -> None:
    bench = await make_bench(max_queued_requests=1, ttft_slo_s=1.0)
    with pytest.raises(Exception, match="choices"):
        await bench.router.open_all([bench.request() for _ in range(3)])
    assert bench.sample("halfmoon_requests_total", outcome="rejected", in_slo="no", miss="rejected", **{"class": "default"}) == 3


async def test_falling_back_to_decode_workers_is_counted_where_prefill_died(bench: Any, peers: Any) -> None:
    await bench.prefills[0].kill()
    while bench.sample("halfmoon_members", role="prefill"):
        await asyncio.sleep(0.005)
    await peers.read(bench.router.open(bench.request()))
    assert bench.sample("halfmoon_fallbacks_total", reason="local_prefill") == 1
