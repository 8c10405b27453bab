"""DecodeScheduler, alone: no engine, no store."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from halfmoon.decode_worker.scheduler import DecodeScheduler, Step
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prefix_pages import PrefixPages
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.errors import ConfigError, PromptTooLong
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2

BLOCK_SIZE = 4
EOS = 999


def make_sequence(num_tokens: int, *, max_tokens: int = 8, priority: int = 0, name: str = "r", **sampling: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Sequence(name, list(range(num_tokens)), num_tokens, params, queue_order=priority)


def make_scheduler(*, num_pages: int = 100, max_running: int = 8, recompute: int = 8) -> DecodeScheduler:
    return DecodeScheduler(
        PageAllocator(num_pages),
        BLOCK_SIZE,
        eos_token_ids=frozenset({EOS}),
        max_running=max_running,
        max_prefill_tokens_per_step=recompute,
    )


def make_sharing_scheduler(num_pages: int) -> DecodeScheduler:
    root = root_key(b"model")
    allocator = PageAllocator(num_pages, PrefixPages(root, BLOCK_SIZE))
    return DecodeScheduler(allocator, BLOCK_SIZE, eos_token_ids=frozenset({EOS}), max_running=8, max_prefill_tokens_per_step=8)


def begin_all(scheduler: DecodeScheduler, num_cached_tokens: int = 0) -> list[Sequence]:
    loading = scheduler.start()
    for sequence in loading:
        scheduler.begin_prefill(sequence, num_cached_tokens)
    return loading


def admit_all(scheduler: DecodeScheduler) -> list[Sequence]:
    loading = scheduler.start()
    for sequence in loading:
        scheduler.admit(sequence, next_token(sequence))
    return loading


def next_token(sequence: Sequence) -> int:
    return sum(sequence.token_ids) * 31 % EOS


def run_step(scheduler: DecodeScheduler) -> tuple[Step, list[Sequence]]:
    step = scheduler.schedule()
    generated = scheduler.record(step, [next_token(sequence) for sequence in step.sampled])
    return step, [item.sequence for item in generated if item.finish_reason is not None]


def test_settings_that_could_never_make_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode\.max_running is 0"):
        make_scheduler(max_running=0)
    with pytest.raises(ConfigError, match=r"decode\.max_prefill_tokens_per_step is 0"):
        make_scheduler(recompute=0)


def test_a_sequence_that_could_outgrow_all_pages_is_refused_with_the_limit() -> None:
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_sequence(10, max_tokens=6))
    with pytest.raises(PromptTooLong, match=r"10 \+ 7 tokens.*hold 16"):
        scheduler.add(make_sequence(10, max_tokens=7))


def test_a_replay_counts_its_sent_tokens_once() -> None:
    scheduler = make_scheduler(num_pages=4)
    replay = make_sequence(10, max_tokens=6)
    replay.token_ids += [1, 2, 3]
    scheduler.check(replay)


def test_every_running_sequence_gets_a_token_a_step_up_to_max_running() -> None:
    scheduler = make_scheduler(max_running=2)
    sequences = [make_sequence(3) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    assert step.chunks == [(sequences[0], 3, 1), (sequences[1], 3, 1)]
    assert step.sampled == sequences[:2]


def test_the_first_token_can_end_a_sequence() -> None:
    scheduler = make_scheduler()
    for sequence, token_id, reason in (
        (make_sequence(3, max_tokens=1), 5, common_pb2.FINISH_REASON_LENGTH),
        (make_sequence(3), EOS, common_pb2.FINISH_REASON_STOP),
    ):
        scheduler.add(sequence)
        assert scheduler.start() == [sequence]
        assert scheduler.admit(sequence, token_id) == reason
        assert scheduler.schedule().chunks == []
        assert sequence.pages
        scheduler.release(sequence)
    assert scheduler.at_rest


def test_only_a_loading_sequence_is_admitted() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(3)
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="not loading"):
        scheduler.admit(sequence, 1)


def test_a_start_leaves_a_free_page_for_each_running_sequence() -> None:
    """Without one, the start would preempt whoever fills its last page next."""
    scheduler = make_scheduler(num_pages=6)
    for name in ("a", "b"):
        scheduler.add(make_sequence(4, name=name))
    admit_all(scheduler)  # two run, in a page each; four are free
    scheduler.add(make_sequence(12, name="c"))  # three pages
    assert scheduler.start() == [] and scheduler.num_waiting == 1
    step, _ = run_step(scheduler)
    assert step.preempted == [] and len(step.chunks) == 2 and scheduler.allocator.num_free == 2


def test_a_finished_sequence_keeps_its_pages_until_they_were_read() -> None:
    scheduler = make_scheduler(num_pages=2)
    sequence = make_sequence(4, max_tokens=3)
    scheduler.add(sequence)
    admit_all(scheduler)
    assert run_step(scheduler)[1] == []
    assert run_step(scheduler)[1] == [sequence]
    assert sequence.num_computed_tokens == 6 and scheduler.allocator.num_free == 0
    scheduler.release(sequence)
    assert scheduler.allocator.num_free == 2 and scheduler.at_rest


def test_the_latest_of_the_least_urgent_is_preempted_first() -> None:
    scheduler = make_scheduler(num_pages=7, max_running=4)
    first, urgent, last = make_sequence(4, name="first"), make_sequence(4, priority=-1, name="urgent"), make_sequence(4, name="last")
    for sequence in (first, urgent, last):
        scheduler.add(sequence)
        admit_all(scheduler)
    for _ in range(4):  # each has two pages of the seven
        assert run_step(scheduler)[0].preempted == []
    step = scheduler.schedule()  # the ninth token of each needs a third page
    assert [chunk.sequence for chunk in step.chunks] == [urgent, first]
    assert step.preempted == [last]
    assert (last.pages, last.num_computed_tokens) == ([], 0)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert scheduler.num_preemptions(last) == 1


def test_a_preempted_sequence_resumes_before_those_that_came_later_in_chunks_within_the_budget() -> None:
    scheduler = make_scheduler(num_pages=7, recompute=5)
    first, second = make_sequence(12, max_tokens=12), make_sequence(8, max_tokens=6)
    for sequence in (first, second):
        scheduler.add(sequence)
        admit_all(scheduler)
    assert run_step(scheduler)[0].preempted == []
    later = make_sequence(4)
    scheduler.add(later)
    while not (step := run_step(scheduler)[0]).preempted:
        assert scheduler.start() == []
    assert step.preempted == [second]
    assert scheduler.start() == []  # neither the preempted one nor, past it, the later
    scheduler.abort(first)
    assert scheduler.start() == [later]
    tokens = list(second.token_ids)
    assert len(tokens) == 13
    chunks = []
    while second.num_tokens == len(tokens):
        chunks += [chunk for chunk in run_step(scheduler)[0].chunks if chunk.sequence is second]
    assert [(start, size) for _, start, size in chunks] == [(0, 5), (5, 5), (10, len(tokens) - 10)]
    assert second.token_ids[:-1] == tokens


def test_a_sequence_ended_early_in_a_step_takes_no_token_from_it_and_keeps_its_pages_for_reading() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(5)
    scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    assert scheduler.finish(sequence) and not scheduler.finish(sequence)
    scheduler.release(sequence)
    assert sequence.pages  # the step writes them still
    assert scheduler.record(step, [1]) == []
    assert sequence.num_tokens == 6 and scheduler.at_rest


def test_an_aborted_sequence_frees_its_pages_after_the_step() -> None:
    scheduler = make_scheduler(num_pages=2)
    sequence = make_sequence(5, max_tokens=3)
    scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    scheduler.abort(sequence)
    assert scheduler.allocator.num_free == 0
    scheduler.record(step, [1])
    assert scheduler.at_rest and scheduler.allocator.num_free == 2


def test_the_pages_of_a_sequence_aborted_while_loading_wait_for_the_loader() -> None:
    scheduler = make_scheduler(num_pages=4)
    sequence = make_sequence(5)
    scheduler.add(sequence)
    scheduler.start()
    scheduler.abort(sequence)
    assert scheduler.allocator.num_free == 2
    scheduler.release(sequence)
    assert scheduler.allocator.num_free == 4 and scheduler.at_rest


def test_the_logits_of_an_aborted_sequence_do_not_shift_the_others() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(3) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    scheduler.abort(sequences[0])
    generated = scheduler.record(step, [10, 11, 12])
    assert [(item.sequence, item.row) for item in generated] == [(sequences[1], 1), (sequences[2], 2)]
    assert [sequence.token_ids[-1] for sequence in sequences[1:]] == [11, 12]


def test_a_prompt_without_a_hand_off_is_computed_in_chunks_behind_its_cached_prefix() -> None:
    scheduler = make_scheduler(recompute=5)
    sequence = make_sequence(16)
    scheduler.add(sequence)
    assert begin_all(scheduler, 4) == [sequence]
    steps = [run_step(scheduler)[0].chunks[0] for _ in range(4)]
    assert [(start, size) for _, start, size in steps] == [(4, 5), (9, 5), (14, 2), (16, 1)]
    assert sequence.num_output_tokens == 2 and len(sequence.pages) == 5


def test_the_first_token_of_a_computed_prompt_can_end_it() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(8, max_tokens=1)
    scheduler.add(sequence)
    begin_all(scheduler)
    assert run_step(scheduler)[1] == [sequence]
    assert sequence.num_computed_tokens == 8, "its blocks are all there to be cached"
    scheduler.release(sequence)
    assert scheduler.at_rest


def test_the_last_token_of_a_prompt_is_always_left_to_compute() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(8)
    scheduler.add(sequence)
    scheduler.start()
    for num_cached_tokens in (-1, 8):
        with pytest.raises(ValueError, match="at least the last one"):
            scheduler.begin_prefill(sequence, num_cached_tokens)
    scheduler.begin_prefill(sequence, 7)
    with pytest.raises(ValueError, match="not loading"):
        scheduler.begin_prefill(sequence, 7)
    assert scheduler.schedule().chunks == [(sequence, 7, 1)]


def test_a_long_prompt_takes_no_token_from_running_sequences_and_they_none_from_it() -> None:
    scheduler = make_scheduler(recompute=8, max_running=3)
    decoding = [make_sequence(3, max_tokens=30) for _ in range(2)]
    for sequence in decoding:
        scheduler.add(sequence)
    admit_all(scheduler)
    prompt = make_sequence(40)
    scheduler.add(prompt)
    begin_all(scheduler)
    for number in range(1, 6):
        run_step(scheduler)
        assert [sequence.num_output_tokens for sequence in decoding] == [1 + number] * 2
        assert prompt.num_computed_tokens == 8 * number
    assert prompt.num_output_tokens == 1


def test_a_prompt_without_its_share_of_the_budget_leaves_its_place_in_the_step() -> None:
    scheduler = make_scheduler(recompute=8, max_running=2)
    prompts = [make_sequence(40, priority=-1) for _ in range(2)]
    for sequence in prompts:
        scheduler.add(sequence)
    begin_all(scheduler)
    decoding = make_sequence(3)
    scheduler.add(decoding)
    admit_all(scheduler)
    step, _ = run_step(scheduler)
    assert step.chunks == [(prompts[0], 0, 8), (decoding, 3, 1)]


def test_a_preempted_prompt_is_computed_from_its_beginning_and_not_loaded_again() -> None:
    scheduler = make_scheduler(num_pages=7, recompute=4)
    first, prompt = make_sequence(8, max_tokens=20), make_sequence(15)
    scheduler.add(first)
    admit_all(scheduler)
    scheduler.add(prompt)
    assert begin_all(scheduler, 4) == [prompt]
    preempted = [sequence for _ in range(5) for sequence in run_step(scheduler)[0].preempted]
    assert preempted == [prompt] and prompt.num_output_tokens > 0
    scheduler.abort(first)
    assert scheduler.start() == [] and prompt.pages and prompt.num_computed_tokens == 0
    assert run_step(scheduler)[0].chunks == [(prompt, 0, 4)]


def test_a_step_ahead_gives_each_sequence_the_token_after_the_one_on_its_way() -> None:
    scheduler = make_scheduler(num_pages=8, max_running=3)
    first, ending, joining = make_sequence(7), make_sequence(3, max_tokens=2), make_sequence(5)
    for sequence in (first, ending):
        scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    scheduler.add(joining)
    admit_all(scheduler)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None and ahead.preempted == []
    assert ahead.chunks == [(first, 8, 1), (joining, 5, 1)], "ending has its last token with the step before"
    assert len(first.pages) == 3, "the token on its way fills the second page"
    assert [item.sequence for item in scheduler.record(step, [11, 12])] == [first, ending]
    assert [item.row for item in scheduler.record(ahead, [21, 22])] == [0, 1]
    assert (first.token_ids[-2:], joining.token_ids[-1]) == ([11, 21], 22)
    assert (first.num_computed_tokens, joining.num_computed_tokens) == (9, 6)


def test_who_ended_in_a_step_loses_its_token_of_the_step_ahead_and_keeps_its_pages_until_then() -> None:
    scheduler = make_scheduler(num_pages=4)
    ended, aborted, going_on = (make_sequence(3) for _ in range(3))
    for sequence in (ended, aborted, going_on):
        scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    assert scheduler.schedule_ahead() is None, "three pages for the fifth tokens are not there, and nobody is preempted"
    assert scheduler.num_running == 3
    scheduler.record(step, [1, 2, 3])
    scheduler.abort(aborted)
    scheduler.release(aborted)
    step = scheduler.schedule()
    assert [chunk.sequence for chunk in step.chunks] == [ended, going_on]
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert [item.finish_reason for item in scheduler.record(step, [EOS, 4])] == [common_pb2.FINISH_REASON_STOP, None]
    scheduler.release(ended)
    assert len(ended.pages) == 2, "the step ahead writes them still"
    assert [(item.sequence, item.row) for item in scheduler.record(ahead, [5, 6])] == [(going_on, 1)]
    assert ended.token_ids[-1] == EOS and going_on.token_ids[-2:] == [4, 6]
    assert scheduler.allocator.num_free == 2


def test_a_prompt_s_chunks_go_ahead_one_behind_the_other_and_its_first_token_behind_the_last() -> None:
    scheduler = make_scheduler(recompute=4)
    decoding, prompt = make_sequence(3, max_tokens=30), make_sequence(9, max_tokens=30)
    scheduler.add(decoding)
    admit_all(scheduler)
    running = scheduler.schedule()
    scheduler.add(prompt)
    begin_all(scheduler)
    spans: list[tuple[int, int]] = []
    for _ in range(5):
        ahead = scheduler.schedule_ahead()
        assert ahead is not None
        spans += [(chunk.start, chunk.num_tokens) for chunk in ahead.chunks if chunk.sequence is prompt]
        assert [chunk.sequence for chunk in ahead.chunks] == [decoding, prompt]
        scheduler.record(running, list(range(11, 11 + len(running.sampled))))
        running = ahead
    assert spans == [(0, 4), (4, 4), (8, 1), (9, 1), (10, 1)], "whole chunks, the prompt's end, and two tokens of its answer"
    assert prompt.num_output_tokens == 2 and running.sampled == [decoding, prompt]


def test_a_prompt_that_is_aborted_with_a_chunk_under_way_and_one_ahead_keeps_its_pages_until_both_are_over() -> None:
    scheduler = make_scheduler(recompute=4)
    decoding, prompt = make_sequence(3, max_tokens=30), make_sequence(20)
    scheduler.add(decoding)
    admit_all(scheduler)
    scheduler.add(prompt)
    begin_all(scheduler)
    num_free = scheduler.allocator.num_free
    running = scheduler.schedule()
    ahead = scheduler.schedule_ahead()
    assert ahead is not None and {chunk.sequence for chunk in ahead.chunks} == {decoding, prompt}
    scheduler.abort(prompt)
    scheduler.release(prompt)
    for step in (running, ahead):
        assert prompt.pages, "a step still writes to them"
        scheduler.record(step, [1] * len(step.sampled))
    assert prompt.pages == [] and scheduler.allocator.num_free > num_free


def test_a_step_that_was_withdrawn_leaves_nothing_behind() -> None:
    scheduler = make_scheduler()
    staying, aborted = make_sequence(3), make_sequence(3)
    for sequence in (staying, aborted):
        scheduler.add(sequence)
    admit_all(scheduler)
    step = scheduler.schedule()
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    scheduler.abort(aborted)
    scheduler.record(step, [1, 2])
    scheduler.withdraw(ahead)
    assert aborted.pages == [] and staying.num_tokens == 5
    assert scheduler.schedule().chunks == [(staying, 4, 1)]


def test_the_scheduler_runs_where_there_is_no_torch_and_no_ray() -> None:
    code = "import sys, halfmoon.decode_worker.scheduler; print(*sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def sharing(num_tokens: int, name: str = "r", **options: Any) -> Sequence:
    sequence = make_sequence(num_tokens, name=name, **options)
    sequence.block_keys = block_keys(root_key(b"model"), sequence.token_ids, BLOCK_SIZE)
    return sequence


def test_a_prompt_begins_behind_the_blocks_that_are_here_and_skips_what_comes_meanwhile() -> None:
    scheduler = make_sharing_scheduler(20)
    first, second = sharing(18, "first"), sharing(18, "second")
    scheduler.add(first)
    scheduler.add(second)
    begin_all(scheduler)
    sizes = [{chunk.sequence.request_id: chunk.num_tokens for chunk in run_step(scheduler)[0].chunks} for _ in range(4)]
    # the step that gives the first one's first token gives the second what is left of its tokens
    assert sizes[:3] == [{"first": 8}, {"first": 8}, {"first": 2, "second": 6}]
    assert sizes[3] == {"first": 1, "second": 2} and second.num_skipped_tokens == 10
    third = sharing(18, "third")
    scheduler.add(third)
    scheduler.start()
    assert third.num_computed_tokens == 16 and third.pages[:4] == first.pages[:4]


def test_a_preempted_sequence_is_back_behind_its_blocks_and_may_end_without_pages() -> None:
    scheduler = make_sharing_scheduler(8)
    first, second = sharing(10, "first", max_tokens=18), Sequence("second", [7] * 10, 10, SamplingParams(max_tokens=18))
    second.block_keys = block_keys(root_key(b"model"), second.token_ids, BLOCK_SIZE)
    for sequence in (first, second):
        scheduler.add(sequence)
    begin_all(scheduler)
    while not scheduler.num_preemptions(second):
        run_step(scheduler)
    assert second.pages == [] and scheduler.num_waiting == 1
    num_cached = scheduler.allocator.num_cached
    assert scheduler.finish(second) and scheduler.allocator.num_cached == num_cached
    scheduler.release(second)
    while first in scheduler._entries:
        if not scheduler.num_running:
            scheduler.release(first)
        else:
            run_step(scheduler)
    assert scheduler.at_rest and scheduler.allocator.num_free == 8


def test_where_an_answer_ended_is_found_before_its_pages_are_released() -> None:
    scheduler = make_sharing_scheduler(20)
    first = sharing(10, max_tokens=5)
    scheduler.add(first)
    begin_all(scheduler)
    while scheduler.num_running:
        run_step(scheduler)
    turn = Sequence("turn", [*first.token_ids, 5, 6, 7], 18, SamplingParams(max_tokens=2))
    turn.block_keys = block_keys(root_key(b"model"), turn.token_ids, BLOCK_SIZE)
    scheduler.add(turn)
    assert scheduler.start() == [turn] and turn.num_computed_tokens == 12
    part = scheduler.allocator.hold_part(turn, 12)
    assert part is not None and part.num_tokens == 2, "the KV of an answer's last token is never computed"
