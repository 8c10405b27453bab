"""Lays out the inputs of a decode step in one host buffer, so that one copy brings them to the device.

buffer  [ token_ids | sources | positions | slot_mapping | … | indices ] [ block table, packed: num_seqs x width ]
          a column of max_batch numbers each; rows beyond the sequences are padding: they write to a scratch slot and read nothing
feed    [ last tokens | token_ids ]     on the device: the tokens of the step before, followed by the buffer's first column
            a row's token is feed[sources]: the host may not know it yet, because the step that gives it still runs

Values that stay from step to step (sampling parameters, pages) are kept, so that a step costs the host a few microseconds a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from .draw_columns import DRAW_COLUMNS, DrawColumns
from .page_rows import PageRows
from .sequence import Sequence
from .staging import layout

COLUMNS = {
    "token_ids": np.dtype(np.int64),
    "sources": np.dtype(np.int64),
    "positions": np.dtype(np.int64),
    "slot_mapping": np.dtype(np.int64),
    "kv_lens": np.dtype(np.int32),
    **DRAW_COLUMNS,
}


def column_offsets(max_batch: int) -> tuple[dict[str, int], int]:
    """Offset of each column in the buffer, and of the block table."""
    return layout({name: dtype.itemsize * max_batch for name, dtype in COLUMNS.items()})


def feed_start(num_results: int) -> int:
    """Index of token_ids in the feed: the length of the last tokens, rounded up so that the columns stay aligned."""
    return layout({"last_tokens": 8 * num_results})[1] // 8


def buffer_bytes(max_batch: int, max_pages: int) -> int:
    return column_offsets(max_batch)[1] + 4 * max_batch * max_pages


class DecodeInputs:
    """Fills buffer: uint8 [buffer_bytes(max_batch, max_pages)]. num_results: last tokens that the feed holds; None: max_batch."""

    def __init__(
        self, buffer: np.ndarray, max_batch: int, max_pages: int, page_size: int, scratch_slot: int, num_results: int | None = None
    ) -> None:
        offsets, self.table_offset = column_offsets(max_batch)
        self.columns = {
            name: buffer[offsets[name] : offsets[name] + dtype.itemsize * max_batch].view(dtype) for name, dtype in COLUMNS.items()
        }
        self._packed = buffer[self.table_offset :].view(np.int32)
        self._page_size = page_size
        self._scratch_slot = scratch_slot
        self._page_rows = PageRows(max_batch, max_pages)
        self._draw_columns = DrawColumns(self.columns)
        self._own_sources = feed_start(num_results or max_batch) + np.arange(max_batch)
        self._width = 0

    @property
    def draws(self) -> bool:
        """True if a sequence of the last fill is not greedy."""
        return self._draw_columns.draws

    def fill(self, sequences: list[Sequence], batch_size: int, last_rows: Seq[int | None] | None = None) -> int:
        """Fills in the next token of each sequence, padded to batch_size rows. Returns the width of the packed block table, or 0 if the
        last fill's table still holds.

        Every sequence has the pages for its tokens.

        Args:
            last_rows: for each sequence its row in the step that still runs, which will give it one more token, or None.
        """
        count = len(sequences)
        columns = self.columns
        lens = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        columns["token_ids"][:count] = [sequence.token_ids[-1] for sequence in sequences]
        columns["sources"][:count] = self._own_sources[:count]
        for row, last_row in enumerate(last_rows or ()):
            if last_row is not None:
                columns["sources"][row] = last_row
                lens[row] += 1
        positions = lens - 1
        columns["positions"][:count] = positions
        columns["kv_lens"][:count] = lens
        taken = self._draw_columns.fill(sequences, lens, batch_size)
        grown = self._page_rows.update(sequences)
        pages = self._page_rows.table[np.arange(count), positions // self._page_size].astype(np.int64)
        columns["slot_mapping"][:count] = pages * self._page_size + positions % self._page_size
        columns["slot_mapping"][count:batch_size] = self._scratch_slot
        for name in ("token_ids", "sources", "positions", "kv_lens"):
            columns[name][count:batch_size] = 0
        width = int(-(-lens.max() // self._page_size))
        if not taken and not grown and width <= self._width:
            return 0
        self._width = width
        self._packed[: count * width].reshape(count, width)[...] = self._page_rows.table[:count, :width]
        return width
