"""Block tables of a step on the host: a row of page numbers a sequence, of which only what has changed is written again."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from .sequence import Sequence


class PageRows:
    """table: int32 [max_rows, max_pages]; beyond a sequence's own pages a row holds what stood there before."""

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self.table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self._pages: list[list[int] | None] = [None] * max_rows  # whose numbers stand in a row
        self._num_pages = [0] * max_rows  # how many of them

    def update(self, sequences: Seq[Sequence], first_row: int = 0) -> bool:
        """Row first_row + i becomes that of sequences[i]; whether anything changed.

        A list of pages only ever grows; a preempted sequence gets a new list.
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
