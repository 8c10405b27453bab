"""What the cluster benchmark makes of what it saw. The moments and tokens here are made up; nothing is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.client.completion import PhaseRecord, Usage
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.sequence import Sequence
from halfmoon.prefill_worker.scheduler import PrefillScheduler
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.proxy.text.tokenizer import Tokenizer

STEP_S = {1: 0.010, 2: 0.014, 3: 0.020}


def test_a_request_that_decodes_alone_is_held_against_the_step_at_batch_1(load) -> None:
    assert load("cluster").bare_tpot((1.0, 2.0), [(1.0, 2.0), (2.0, 3.0), (0.0, 1.0)], STEP_S) == pytest.approx(0.010)


def test_a_request_beside_others_is_held_against_the_steps_of_the_batches_that_ran(load) -> None:
    # 0.28 s of two are 20 steps, 0.28 s alone 28, 0.28 s of three or more 14
    others = [(9.0, 10.28), (10.56, 11.5), (10.56, 11.0), (10.70, 12.0)]
    found = load("cluster").bare_tpot((10.0, 10.84), [(10.0, 10.84), *others], STEP_S)
    assert found == pytest.approx(0.84 / (20 + 28 + 14))


def test_answers_that_part_are_told_with_where_and_how_clear_the_engines_choice_was(load) -> None:
    rows = load("cluster").compared([[5, 6, 7], [5, 6, 7], [5, 6, 7]], [[0.3, 0.001]] * 3, [[5, 6, 7], [5, 6, 8], [4, 6, 7]])
    assert rows == [{"equal": True}, {"equal": False, "at": 2, "lead": 0.001}, {"equal": False, "at": 0, "lead": None}]


def test_figures_are_of_the_client_and_rates_of_the_bytes_that_moved(load) -> None:
    cluster = load("cluster")
    phases = PhaseRecord(prefill_s=0.3, push_s=0.1, prefix_load_s=0.5, ttft_s=0.42, num_bytes_pushed=2 * 10**9, transport="shm")
    samples = [
        cluster.Sample(start, (start + 0.45, start + 0.46, start + 0.47), (1, 2, 3), phases, Usage(8, 3, 4)) for start in (1.0, 2.0, 3.0)
    ]
    found = cluster.figures(samples, {"prefill_s": 0.3, "step_s": {1: 0.008}}, kv_bytes_per_token=10**9)
    assert found["ttft_s"]["median"] == pytest.approx(0.45) and found["ttft_of_bare"]["median"] == pytest.approx(1.5)
    assert found["ttft_over_bare_s"]["median"] == pytest.approx(0.15)
    assert found["tpot_s"]["median"] == pytest.approx(0.010) and found["tpot_of_bare"]["median"] == pytest.approx(1.25)
    assert found["before_client_s"]["median"] == pytest.approx(0.03)
    assert found["handed_off_gb_s"]["median"] == pytest.approx(5.0) and found["loaded_gb_s"]["median"] == pytest.approx(8.0)


@pytest.mark.parametrize(("num_tokens", "limit"), [(8192, 2048), (300, 2048), (300, 100), (257, 128), (64, 64)])
def test_the_engine_alone_computes_a_prompt_in_the_prefill_workers_steps(load, num_tokens: int, limit: int) -> None:
    prompt = Sequence("r", [1] * num_tokens, num_tokens, SamplingParams())
    scheduler = PrefillScheduler(PageAllocator(200), 64, limit)
    scheduler.add(prompt)
    scheduler.start()
    scheduler.ready(prompt, 0)
    steps = []
    while (step := scheduler.schedule()).chunks:
        steps += step.chunks
        scheduler.record(step)
    assert list(load("engine_alone").chunks_of(prompt, limit, 64)) == steps


def test_a_shapes_tokenizer_has_a_word_for_every_token_of_the_model(load, tmp_path: Path) -> None:
    shapes = load("shapes")
    shapes.write_tokenizer("small", shapes.write_shape("small", tmp_path))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == shapes.SHAPES["small"]["vocab_size"]
    assert tokenizer.encode("t5 t2047 t0") == [5, 2047, 0] and tokenizer.decode([5, 2047]) == "t5 t2047"
    assert not any(tokenizer.is_silent(token_id) for token_id in (0, 5, 2047))
