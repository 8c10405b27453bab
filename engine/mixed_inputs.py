"""Lays out the inputs of a step of decode tokens and chunks in one host buffer, so that one copy brings them to the device.

rows      [ a token of each decoding sequence | chunk | chunk | … | padding ]           num_rows; the step's kernels see all of them
buffer    [ tokens | sources | positions | slot_mapping | kv_lens … | sampling columns ] [ block tables of chunks and of decodes, packed ]
results   row i of the sampling columns is the i-th chunk that samples: a decode token, or the last chunk of a prompt
table     [ nobody | chunks … | decodes … ]     to the prefill kernel the decode rows are sequence 0, which has no keys and is skipped

A decode token that the host does not know yet is given by its row in the results of the step before (sources), any other by its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .batch import StepBatch
from .draw_columns import DRAW_COLUMNS, DrawColumns
from .page_rows import PageRows
from .sequence import Sequence, StepChunk
from .staging import DTYPES, layout

HOST = -1  # the source of a token that the host knows


class MixedStep(NamedTuple):
    """A step's chunks in the order of the rows."""

    decodes: list[StepChunk]
    chunks: list[StepChunk]
    sampled: list[tuple[StepChunk, int]]  # each with the row of its last token, in the step's own order

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)


def split_step(chunks: Seq[StepChunk]) -> MixedStep:
    """A chunk with only its sequence's next token is a decode row. It may begin at the end of the sequence's token_ids."""
    decodes = [chunk for chunk in chunks if chunk.is_decode]
    others = [chunk for chunk in chunks if not chunk.is_decode]
    last_rows: dict[Sequence, int] = {}
    end = 0
    for chunk in (*decodes, *others):
        end += chunk.num_tokens
        last_rows[chunk.sequence] = end - 1
    sampled = [(chunk, last_rows[chunk.sequence]) for chunk in chunks if chunk.samples]
    return MixedStep(decodes, others, sampled)


@dataclass(frozen=True, slots=True)
class MixedSize:
    """Capacity of the buffers."""

    num_rows: int
    num_decodes: int
    num_chunks: int
    num_results: int
    num_pages: int  # of a sequence

    def columns(self) -> dict[str, tuple[np.dtype, int]]:
        rows, results = np.dtype(np.int64), self.num_results
        return {
            **dict.fromkeys(("tokens", "sources", "positions", "slot_mapping"), (rows, self.num_rows)),
            "last_rows": (rows, results),
            **{name: (dtype, results) for name, dtype in DRAW_COLUMNS.items()},
            "decode_lens": (np.dtype(np.int32), self.num_decodes),
            "chunk_lens": (np.dtype(np.int32), self.num_chunks + 1),
            "cu_seqlens": (np.dtype(np.int32), self.num_chunks + 2),
        }

    def offsets(self) -> tuple[dict[str, int], int]:
        """Offset of each column, and of the packed block table."""
        return layout({name: dtype.itemsize * count for name, (dtype, count) in self.columns().items()})

    @property
    def num_bytes(self) -> int:
        return self.offsets()[1] + 4 * (self.num_chunks + self.num_decodes) * self.num_pages

    def fits(self, step: MixedStep) -> bool:
        return (
            step.num_rows <= self.num_rows
            and len(step.decodes) <= self.num_decodes
            and len(step.chunks) <= self.num_chunks
            and len(step.sampled) <= self.num_results
        )


def views(size: MixedSize, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns in a uint8 buffer of size.num_bytes."""
    offsets, _ = size.offsets()
    return {
        name: buffer[offsets[name] : offsets[name] + dtype.itemsize * count].view(DTYPES[dtype])
        for name, (dtype, count) in size.columns().items()
    }


class MixedInputs:
    """Fills buffer: uint8 [size.num_bytes]."""

    def __init__(self, buffer: torch.Tensor, size: MixedSize, page_size: int, scratch_slot: int) -> None:
        self.size = size
        self.table_offset = size.offsets()[1]
        self._columns: dict[str, np.ndarray] = {name: view.numpy() for name, view in views(size, buffer).items()}
        self._columns["top_ps"].fill(1.0)
        self._packed = buffer[self.table_offset :].numpy().view(np.int32)
        self._page_size = page_size
        self._scratch_slot = scratch_slot
        self._draw_columns = DrawColumns(self._columns)
        self._page_rows = PageRows(size.num_chunks + size.num_decodes, size.num_pages)
        self._held: list[Sequence] = []  # sequences whose table rows are on the device
        self._num_held_chunks = 0
        self._width = 0

    @property
    def draws(self) -> bool:
        """True if a sequence that the last step samples is not greedy."""
        return self._draw_columns.draws

    def fill(self, step: MixedStep, num_rows: int, num_results: int, last_results: Mapping[Sequence, int]) -> int:
        """Lays the step out, padded to num_rows rows and num_results results.

        Args:
            last_results: result rows of the step before, for sequences whose token the host may not know yet.

        Returns:
            The width of the packed block tables, chunks first, or 0 if those of the last fill still hold.
        """
        width = self._fill_tables(step)
        columns, num_decodes = self._columns, len(step.decodes)
        end = num_decodes
        self._fill_decodes(step.decodes, last_results)
        columns["cu_seqlens"][:2] = 0, end
        for number, chunk in enumerate(step.chunks):
            self._fill_chunk(chunk, number, end)
            end += chunk.num_tokens
            columns["cu_seqlens"][number + 2] = end
        columns["chunk_lens"][0] = 0
        columns["chunk_lens"][len(step.chunks) + 1 :] = 0
        columns["cu_seqlens"][len(step.chunks) + 2 :] = end
        columns["tokens"][end:num_rows] = 0
        columns["sources"][end:num_rows] = HOST
        columns["positions"][end:num_rows] = 0
        columns["slot_mapping"][end:num_rows] = self._scratch_slot
        ends = np.fromiter((chunk.start + chunk.num_tokens for chunk, _ in step.sampled), np.int64, len(step.sampled))
        columns["last_rows"][: len(ends)] = [row for _, row in step.sampled]
        columns["last_rows"][len(ends) :] = 0
        self._draw_columns.fill([chunk.sequence for chunk, _ in step.sampled], ends, num_results)
        return width

    def _fill_decodes(self, decodes: Seq[StepChunk], last_results: Mapping[Sequence, int]) -> None:
        columns, count, first = self._columns, len(decodes), self.size.num_chunks
        starts = np.fromiter((chunk.start for chunk in decodes), np.int64, count)
        unknown = [chunk.start == len(chunk.sequence.token_ids) for chunk in decodes]
        columns["tokens"][:count] = [
            0 if late else chunk.sequence.token_ids[chunk.start] for chunk, late in zip(decodes, unknown, strict=True)
        ]
        columns["sources"][:count] = [last_results[chunk.sequence] if late else HOST for chunk, late in zip(decodes, unknown, strict=True)]
        columns["positions"][:count] = starts
        columns["decode_lens"][:count] = starts + 1
        columns["decode_lens"][count:] = 0
        pages = self._page_rows.table[first + np.arange(count), starts // self._page_size].astype(np.int64)
        columns["slot_mapping"][:count] = pages * self._page_size + starts % self._page_size

    def _fill_chunk(self, chunk: StepChunk, number: int, row: int) -> None:
        columns, stop = self._columns, row + chunk.num_tokens
        end = chunk.start + chunk.num_tokens
        positions = np.arange(chunk.start, end)
        pages = self._page_rows.table[number, positions // self._page_size].astype(np.int64)
        columns["tokens"][row:stop] = chunk.sequence.token_ids[chunk.start : end]
        columns["sources"][row:stop] = HOST
        columns["positions"][row:stop] = positions
        columns["slot_mapping"][row:stop] = pages * self._page_size + positions % self._page_size
        columns["chunk_lens"][number + 1] = end

    def _fill_tables(self, step: MixedStep) -> int:
        owners = [chunk.sequence for chunk in (*step.chunks, *step.decodes)]
        grown = self._page_rows.update([chunk.sequence for chunk in step.chunks])
        grown |= self._page_rows.update([chunk.sequence for chunk in step.decodes], self.size.num_chunks)
        width = max(-(-(chunk.start + chunk.num_tokens) // self._page_size) for chunk in (*step.chunks, *step.decodes))
        # the number of chunks matters too: a sequence's row changes when it turns from a chunk into a decode row
        if not grown and width <= self._width and owners == self._held and len(step.chunks) == self._num_held_chunks:
            return 0
        self._width, self._held, self._num_held_chunks = width, owners, len(step.chunks)
        table = self._page_rows.table
        for place, rows in self._parts(step):
            self._packed[place * width : (place + len(rows)) * width].reshape(-1, width)[...] = table[rows, :width]
        return width

    def _parts(self, step: MixedStep) -> Iterator[tuple[int, np.ndarray]]:
        """For each part of the packed table: where it begins, and its rows."""
        yield 0, np.arange(len(step.chunks))
        yield len(step.chunks), self.size.num_chunks + np.arange(len(step.decodes))


def copy_tables(packed: torch.Tensor, step: MixedStep, width: int, size: MixedSize, table: torch.Tensor) -> None:
    """packed: int32, as fill() left it, on the table's device; table: int32 [1 + num_chunks + num_decodes, num_pages]."""
    num_chunks, num_decodes = len(step.chunks), len(step.decodes)
    rows = packed[: (num_chunks + num_decodes) * width].view(-1, width)
    if num_chunks:
        table[1 : 1 + num_chunks, :width].copy_(rows[:num_chunks])
    if num_decodes:
        first = 1 + size.num_chunks
        table[first : first + num_decodes, :width].copy_(rows[num_chunks:])


def mixed_batch(
    columns: Mapping[str, torch.Tensor], table: torch.Tensor, results: torch.Tensor, size: MixedSize, num_rows: int, max_model_len: int
) -> StepBatch:
    """The batch that the decoder reads, of the columns' first num_rows rows.

    Args:
        results: int64, tokens of the step before, by row.
    """
    sources = columns["sources"][:num_rows]
    known = torch.where(sources == HOST, columns["tokens"][:num_rows], results.index_select(0, sources.clamp(min=0)))
    num_decodes, first = min(size.num_decodes, num_rows), 1 + size.num_chunks
    return StepBatch(
        token_ids=known,
        positions=columns["positions"][:num_rows],
        slot_mapping=columns["slot_mapping"][:num_rows],
        block_table=table[:first],
        cu_seqlens_q=columns["cu_seqlens"],
        kv_lens=columns["chunk_lens"],
        last_rows=columns["last_rows"],
        max_seqlen_q=num_rows,
        max_kv_len=max_model_len,
        decode_table=table[first : first + num_decodes],
        decode_lens=columns["decode_lens"][:num_decodes],
        usual_num_seqs=1,
    )
