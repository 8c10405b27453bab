"""What a decode step reads, laid out in one host buffer so that one copy brings it to the device.

buffer  [ token_ids | sources | positions | slot_mapping | … | indices ] [ block table, packed: num_seqs x width ]
          a column of max_batch numbers each; rows beyond the sequences are padding: they write to a scratch slot and read nothing
feed    [ last tokens | token_ids ]     on the device: what the step before gave, and right behind it the buffer's first column
            a row's token is feed[sources]: the host may not know it yet, for the step that gives it still runs

What stays from step to step (sampling parameters, pages) is kept, so that a step costs the host a few microseconds a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from .sequence import Sequence
from .staging import layout

COLUMNS = {
    "token_ids": np.dtype(np.int64),
    "sources": np.dtype(np.int64),
    "positions": np.dtype(np.int64),
    "slot_mapping": np.dtype(np.int64),
    "kv_lens": np.dtype(np.int32),
    "temperatures": np.dtype(np.float32),
    "top_ks": np.dtype(np.int64),
    "top_ps": np.dtype(np.float32),
    "min_ps": np.dtype(np.float32),
    "seeds": np.dtype(np.int64),
    "indices": np.dtype(np.int64),
}
# what a padding row holds; its slot_mapping is the scratch slot
PADDING = {name: 1 if name == "top_ps" else 0 for name in COLUMNS}


def column_offsets(max_batch: int) -> tuple[dict[str, int], int]:
    """Where each column begins in the buffer, and where the block table does."""
    return layout({name: dtype.itemsize * max_batch for name, dtype in COLUMNS.items()})


def feed_start(max_batch: int) -> int:
    """Where token_ids begin in the feed: the numbers that the last tokens take, and what keeps the columns aligned."""
    return layout({"last_tokens": 8 * max_batch})[1] // 8


def buffer_bytes(max_batch: int, max_pages: int) -> int:
    return column_offsets(max_batch)[1] + 4 * max_batch * max_pages


class DecodeInputs:
    """Fills buffer: uint8 [buffer_bytes(max_batch, max_pages)]."""

    def __init__(self, buffer: np.ndarray, max_batch: int, max_pages: int, page_size: int, scratch_slot: int) -> None:
        offsets, self.table_offset = column_offsets(max_batch)
        self.columns = {
            name: buffer[offsets[name] : offsets[name] + dtype.itemsize * max_batch].view(dtype) for name, dtype in COLUMNS.items()
        }
        self._packed = buffer[self.table_offset :].view(np.int32)
        self._page_size = page_size
        self._scratch_slot = scratch_slot
        self._table = np.zeros((max_batch, max_pages), dtype=np.int32)
        self._pages: list[list[int] | None] = [None] * max_batch  # whose numbers stand in a row of the table
        self._num_pages = [0] * max_batch  # how many of them
        self._sequences: list[Sequence] = []
        self._num_prompt_tokens = np.zeros(0, dtype=np.int64)
        self._own_sources = feed_start(max_batch) + np.arange(max_batch)
        self._width = 0
        self.draws = False
        """Whether a sequence of the last fill is not greedy."""

    def fill(self, sequences: list[Sequence], batch_size: int, last_rows: Seq[int | None] | None = None) -> int:
        """The next token of each sequence, padded to batch_size rows. Returns the width of the packed block table; 0 where the last
        fill's table still holds.

        Every sequence has the pages for its tokens.

        Args:
            last_rows: of the step before, which still runs: the row that gives a sequence one token more than it has here, or None.
        """
        count = len(sequences)
        taken = sequences != self._sequences  # by identity
        if taken:
            self._take(sequences)
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
        columns["indices"][:count] = lens - self._num_prompt_tokens
        grown = self._update_table(sequences)
        pages = self._table[np.arange(count), positions // self._page_size].astype(np.int64)
        columns["slot_mapping"][:count] = pages * self._page_size + positions % self._page_size
        if count < batch_size:
            for name, column in columns.items():
                column[count:batch_size] = self._scratch_slot if name == "slot_mapping" else PADDING[name]
        width = int(-(-lens.max() // self._page_size))
        if not taken and not grown and width <= self._width:
            return 0
        self._width = width
        self._packed[: count * width].reshape(count, width)[...] = self._table[:count, :width]
        return width

    def _take(self, sequences: list[Sequence]) -> None:
        params = [sequence.sampling for sequence in sequences]
        count = len(sequences)
        self._sequences = list(sequences)
        self._num_prompt_tokens = np.array([sequence.num_prompt_tokens for sequence in sequences], dtype=np.int64)
        self.draws = not all(one.greedy for one in params)
        self.columns["temperatures"][:count] = [one.temperature for one in params]
        self.columns["top_ks"][:count] = [one.top_k for one in params]
        self.columns["top_ps"][:count] = [one.top_p for one in params]
        self.columns["min_ps"][:count] = [one.min_p for one in params]
        self.columns["seeds"][:count] = np.array([one.seed for one in params], dtype=np.uint64).view(np.int64)

    def _update_table(self, sequences: Seq[Sequence]) -> bool:
        """Whether it changed. A list of pages only ever grows; a preempted sequence gets a new list."""
        changed = False
        for row, sequence in enumerate(sequences):
            pages = sequence.pages
            known = self._num_pages[row] if self._pages[row] is pages else 0
            if known != len(pages):
                self._table[row, known : len(pages)] = pages[known:]
                self._pages[row], self._num_pages[row] = pages, len(pages)
                changed = True
        return changed
