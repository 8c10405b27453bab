"""A step's block tables on the host: a row of page numbers for each sequence. Only changed rows are written again."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from .sequence import Sequence


class PageRows:
    """table: int32 [max_rows, max_pages]. Beyond a sequence's own pages a row has old values."""

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self.table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self._pages: list[list[int] | None] = [None] * max_rows  # the page list written to each row
        self._num_pages = [0] * max_rows  # how many of its pages are written

    def update(self, sequences: Seq[Sequence], first_row: int = 0) -> bool:
        """Makes row first_row + i that of sequences[i]. Returns whether anything changed.

        A list of pages only grows; a preempted sequence gets a new list.
        """
        changed = False
        for row, sequence in enumerate(sequences, first_row):
            pages = sequence.pages
            known = self._num_pages[row] if self._pages[row] is pages else 0
            if known != len(pages):
                self.table[row, known : len(pages)] = pages[known:]
                self._pages[row], self._num_pages[row] = pages, len(pages)
                changed = True
        return changed
