"""deploy/profile_timeline.py: what records of requests say of workers. Times are made up, and worked out by hand."""

from __future__ import annotations

import pytest

from halfmoon.client import PhaseRecord
from halfmoon.deploy.profile_timeline import Sample, Span, Timeline

NODES = {"prefill-0": "one", "prefill-1": "one", "decode-0": "one", "decode-1": "one", "far": "other"}


def sample(
    sent: float, prefill_s: float, tokens: tuple[float, ...] = (), *, prompt: int = 100, cached: int = 0, prefill: str = "prefill-0",
    decode: str = "decode-0", queue_s: float = 0.0, rest_s: float = 0.01,
) -> Sample:  # fmt: skip
    """Prefill from sent + queue_s on."""
    ttft_s = queue_s + prefill_s + rest_s
    phases = PhaseRecord(
        queue_s=queue_s, prefill_s=prefill_s, ttft_s=ttft_s, prefill_worker=prefill, decode_worker=decode, num_bytes_pushed=800,
        push_s=0.001, handoff_wait_s=0.002,
    )  # fmt: skip
    return Sample(sent, tokens or (sent + ttft_s,), prompt, cached, cached * 8, phases)


def ticks(start: float, count: int, step: float) -> tuple[float, ...]:
    return tuple(start + number * step for number in range(count))


def test_a_prefill_alone_is_a_point_and_two_at_once_on_a_worker_are_none() -> None:
    lonely, first, second = sample(0.0, 1.0, cached=64), sample(5.0, 1.0), sample(5.5, 1.0)
    elsewhere = sample(5.2, 0.5, prefill="prefill-1")
    points = Timeline([lonely, first, second, elsewhere], NODES).prefill_points(1000)
    assert [(point.num_new, point.num_prefix, point.seconds) for point in points] == [(36, 64, 1.0), (100, 0, 0.5)]
    assert points[0].busy == ((1, 1.0),) and points[1].busy == ((2, 1.0),)


def test_a_prompt_of_several_steps_is_no_point() -> None:
    assert not Timeline([sample(0.0, 1.0)], NODES).prefill_points(99)


def test_a_span_is_told_how_many_workers_of_its_machine_computed_in_it() -> None:
    decoding = sample(-1.0, 0.5, ticks(0.0, 11, 1.0))
    beside = sample(4.0, 2.0, prefill="prefill-1", decode="decode-1")
    far = sample(0.0, 9.0, prefill="far", decode="far")
    timeline = Timeline([decoding, beside, far], NODES)
    assert dict(timeline.busy(Span("decode-0", 0.0, 10.0))) == pytest.approx({1: 0.8, 2: 0.2})
    assert dict(timeline.busy(Span("prefill-0", 4.5, 5.0))) == pytest.approx({3: 1.0}), "the asker counts, though it has no span there"


def test_steps_are_cut_into_stretches_of_one_batch_beside_the_same_workers() -> None:
    # decode-0: one sequence from 0 s, two from 10 s, one from 20 s on; prefill-1 computes from 4 to 7 s
    first = sample(-1.0, 0.5, (*ticks(0.0, 11, 1.0), *ticks(12.0, 5, 2.0), *ticks(21.0, 10, 1.0)), prompt=50)
    second = sample(9.0, 0.5, ticks(10.0, 6, 2.0), prompt=70, prefill="far")
    beside = sample(4.0, 3.0, prefill="prefill-1", decode="far")
    points = Timeline([first, second, beside], NODES).step_points()
    # stretches with fewer than seven tokens are none: 0 to 4, 4 to 7, 7 to 10 and 10 to 20 s
    assert [(point.num_sequences, point.seconds, point.busy) for point in points] == [(1, 1.0, ((1, 1.0),))]
    assert points[0].num_kv_tokens == 50 + 11 + 5 + 5, "at its middle, 25 s"


def test_a_batchs_step_is_its_sequences_mean_and_its_context_all_of_theirs() -> None:
    first, second = sample(-1.0, 0.5, ticks(0.0, 21, 1.0), prompt=50), sample(-1.0, 0.5, ticks(0.0, 21, 1.0), prompt=70, prefill="far")
    (point,) = Timeline([first, second], NODES).step_points()
    assert (point.num_sequences, point.num_kv_tokens, point.seconds) == (2, 50 + 11 + 70 + 11, 1.0)


def test_tokens_that_came_in_a_lump_tell_no_step() -> None:
    lumps = tuple(float(number // 10) for number in range(50))  # five messages of ten tokens
    assert not Timeline([sample(-1.0, 0.5, lumps)], NODES).step_points()


def test_what_a_request_cost_beside_its_prefill_is_told_by_those_that_were_alone() -> None:
    alone, crossed = sample(0.0, 1.0, cached=64, queue_s=0.5), sample(5.0, 1.0)
    crossing = sample(5.5, 1.0, prefill="prefill-1", decode="decode-1")
    (point,) = Timeline([alone, crossed, crossing], NODES).request_points()
    assert (point.num_bytes_loaded, point.num_bytes_pushed) == (512, 800)
    assert point.handed_off_s == pytest.approx(0.003) and point.beside_s == pytest.approx(0.51)
