"""The buffer of a decode step against what prepare_batch makes of the same chunks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.engine.batch import prepare_batch
from halfmoon.engine.decode_inputs import COLUMNS, DecodeInputs, buffer_bytes, column_offsets, feed_start
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.protocol.sampling import SamplingParams

PAGE_SIZE, MAX_BATCH, MAX_PAGES, SCRATCH_SLOT = 4, 8, 20, 999 * 4


def sequence(number: int, num_tokens: int, **sampling) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 64, "seed": 2**63 + number, **sampling})
    pages = [100 * number + page for page in range(-(-num_tokens // PAGE_SIZE))]
    return Sequence(f"r{number}", list(range(1000 * number, 1000 * number + num_tokens)), num_tokens, params, pages=pages)


class Reader:
    """Decode inputs and the device's side of them: columns, a table that is written to only where the buffer brings one, the feed."""

    def __init__(self) -> None:
        self.buffer = np.zeros(buffer_bytes(MAX_BATCH, MAX_PAGES), dtype=np.uint8)
        self.inputs = DecodeInputs(self.buffer, MAX_BATCH, MAX_PAGES, PAGE_SIZE, SCRATCH_SLOT)
        self.table = np.full((MAX_BATCH, MAX_PAGES), -1, dtype=np.int32)
        self.num_tables = 0
        self.last_tokens = np.full(feed_start(MAX_BATCH), -1, dtype=np.int64)

    def fill(self, sequences: list[Sequence], batch_size: int, last_rows: list[int | None] | None = None) -> None:
        width = self.inputs.fill(sequences, batch_size, last_rows)
        offset = column_offsets(MAX_BATCH)[1]
        packed = self.buffer[offset : offset + 4 * len(sequences) * width].view(np.int32).reshape(len(sequences), width)
        self.table[: len(sequences), :width] = packed
        self.num_tables += width > 0

    def column(self, name: str) -> list:
        offset = column_offsets(MAX_BATCH)[0][name]
        return self.buffer[offset : offset + COLUMNS[name].itemsize * MAX_BATCH].view(COLUMNS[name]).tolist()

    def token_ids(self) -> list[int]:
        """What the graph computes, of the feed as it lies on the device."""
        assert column_offsets(MAX_BATCH)[0]["token_ids"] == 0, "the feed ends with the first column"
        feed = [*self.last_tokens.tolist(), *self.column("token_ids")]
        return [feed[source] for source in self.column("sources")]


def check(reader: Reader, sequences: list[Sequence], batch_size: int) -> None:
    batch = prepare_batch([StepChunk(one, one.num_tokens - 1, 1) for one in sequences], PAGE_SIZE, torch.device("cpu"))
    count = len(sequences)
    assert reader.token_ids()[:count] == batch.token_ids.tolist()
    for name in ("positions", "slot_mapping", "kv_lens"):
        assert reader.column(name)[:count] == getattr(batch, name).tolist()
    for row, wanted, kv_len in zip(reader.table, batch.block_table, batch.kv_lens, strict=False):
        num_pages = -(-int(kv_len) // PAGE_SIZE)
        assert row[:num_pages].tolist() == wanted[:num_pages].tolist()
    assert reader.column("indices")[:count] == [one.num_output_tokens for one in sequences]
    params = [one.sampling for one in sequences]
    assert np.array(reader.column("seeds")[:count], dtype=np.int64).view(np.uint64).tolist() == [one.seed for one in params]
    for name, values in {"top_ks": [one.top_k for one in params], "temperatures": [one.temperature for one in params]}.items():
        assert np.allclose(reader.column(name)[:count], values)
    assert reader.column("kv_lens")[count:batch_size] == [0] * (batch_size - count)
    assert reader.column("slot_mapping")[count:batch_size] == [SCRATCH_SLOT] * (batch_size - count)
    assert reader.column("temperatures")[count:batch_size] == [0.0] * (batch_size - count)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["step", "join", "leave", "preempt", "swap"]), st.integers(0, 99)), max_size=25))
def test_every_step_is_filled_as_if_it_were_the_first(events):
    """Sequences that grow, join, leave, come back on other pages and change rows."""
    reader, running, number = Reader(), [sequence(1, 5), sequence(2, 9, temperature=1.0, top_k=3)], 3
    for kind, value in events:
        if kind == "join" and len(running) < MAX_BATCH:
            running.append(sequence(number, 1 + value % 17, temperature=0.5, top_k=value))
            number += 1
        elif kind == "leave" and len(running) > 1:
            running.pop(value % len(running))
        elif kind == "preempt":
            chosen = running[value % len(running)]
            chosen.pages = [5000 + 50 * number + page for page in range(len(chosen.pages))]
            number += 1
        elif kind == "swap":
            running.append(running.pop(0))
        batch_size = next(size for size in (1, 2, 4, 8) if size >= len(running))
        reader.fill(running, batch_size)
        check(reader, running, batch_size)
        for one in running:
            one.token_ids.append(value)
            if one.num_tokens > len(one.pages) * PAGE_SIZE:
                one.pages.append(9000 + number * 60 + one.num_tokens)
        running = [one for one in running if one.num_tokens < MAX_PAGES * PAGE_SIZE - 1] or [sequence(number, 3)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["stay", "join", "leave", "swap"]), st.booleans(), st.integers(0, 99)), max_size=25))
def test_a_token_still_on_its_way_counts_as_if_it_were_here(events):
    """The step before gives it in whatever row it had there; the host hears of it once this step's buffer is filled."""
    reader, running, number = Reader(), [sequence(1, 3), sequence(2, 8, temperature=1.0)], 3
    on_their_way: dict[Sequence, tuple[int, int]] = {}
    for kind, late, value in events:
        if kind == "join" and len(running) < MAX_BATCH:
            running.insert(value % (len(running) + 1), sequence(number, 1 + value % 13, temperature=0.5))
            number += 1
        elif kind == "leave" and len(running) > 1:
            running.pop(value % len(running))
        elif kind == "swap":
            running.append(running.pop(0))
        for one in running:
            if one.num_tokens + (one in on_their_way) > len(one.pages) * PAGE_SIZE:
                one.pages.append(9000 + number * 60 + one.num_tokens)
        batch_size = next(size for size in (1, 2, 4, 8) if size >= len(running))
        reader.fill(running, batch_size, [on_their_way[one][0] if one in on_their_way else None for one in running])
        for one, (_, token) in on_their_way.items():
            one.token_ids.append(token)
        check(reader, running, batch_size)
        given = {one: (row, 7000 + 10 * value + row) for row, one in enumerate(running)}
        reader.last_tokens[: len(running)] = [token for _, token in given.values()]
        on_their_way = given if late else {}
        if not late:
            for one, (_, token) in given.items():
                one.token_ids.append(token)
        running = [one for one in running if one.num_tokens < MAX_PAGES * PAGE_SIZE - 2] or [sequence(number, 3)]


def test_the_feed_keeps_the_columns_aligned():
    for max_batch in (1, 2, 3, 8, 255):
        assert feed_start(max_batch) >= max_batch and feed_start(max_batch) * 8 % 16 == 0


def test_the_table_is_brought_only_where_it_changed():
    reader, one = Reader(), sequence(1, 5)
    one.pages += [77, 78]
    for _ in range(4):
        reader.fill([one], 1)
        one.token_ids.append(0)
    assert reader.num_tables == 1  # tokens 5 to 8: the second page all along
    reader.fill([one], 1)
    assert reader.num_tables == 2 and reader.table[0, 2] == 77


def test_a_sequence_that_pauses_finds_its_whole_row_again():
    """Meanwhile the table grew wider, and its row was not part of it."""
    reader, one, other = Reader(), sequence(1, 4), sequence(2, 4)
    one.pages += [71, 72, 73]
    other.pages += [81, 82, 83]
    for running, count in (([one, other], PAGE_SIZE), ([one], 0), ([one, other], 0)):
        reader.fill(running, 2)
        check(reader, running, 2)
        one.token_ids += [0] * count
        other.token_ids += [0] * count


def test_draws_tells_of_a_sequence_that_is_not_greedy():
    inputs = Reader().inputs
    for sampling, draws in (({}, False), ({"temperature": 0.5}, True), ({"top_k": 5}, False)):
        inputs.fill([sequence(1, 4, **sampling), sequence(2, 4)], 2)
        assert inputs.draws is draws
