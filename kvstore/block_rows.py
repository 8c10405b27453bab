"""BlockRows: one layer of a run of blocks where its bytes stand, as few arrays as there are runs of neighbouring slots.

slots 4 5 6 9  ─►  runs: uint8 [3, layer_bytes] (rows one slot apart) · uint8 [1, layer_bytes]      a run is one strided copy
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class BlockRows(Sequence[np.ndarray]):
    """A sequence of uint8 [layer_bytes], a view for each block."""

    def __init__(self, runs: list[np.ndarray]) -> None:
        """runs: uint8 [blocks of the run, layer_bytes], rows contiguous in themselves."""
        self.runs = runs

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __iter__(self) -> Iterator[np.ndarray]:
        for run in self.runs:
            yield from run

    def behind(self, num_blocks: int) -> BlockRows:
        """Those behind the first num_blocks."""
        runs: list[np.ndarray] = []
        for run in self.runs:
            if num_blocks < len(run):
                runs.append(run[num_blocks:])
            num_blocks = max(num_blocks - len(run), 0)
        return BlockRows(runs)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        return list(self)[index]
