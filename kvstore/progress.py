"""How much of a lease's blocks has been written, layer by layer, and what a fetcher has not been told yet.

             layer 0  1  2  3
block 0            ■  ■  ■  ■     done
block 1            ■  ■  □  □     num_layers_done = 2: the layers of a block come in ascending order
block 2            □  □  □  □
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..protocol.errors import HandoffIncomplete, InvalidRequest

MAX_NAMED = 8  # blocks named in a message; all of them would not fit a line


class SliceRange(NamedTuple):
    """Layers from layer on of a run of blocks."""

    layer: int
    first_block: int
    num_blocks: int
    num_layers: int = 1


class Progress:
    def __init__(self, num_blocks: int, num_layers: int, present: Sequence[bool] = ()) -> None:
        """present: blocks that are complete from the start."""
        self.num_layers = num_layers
        self.num_layers_done = np.zeros(num_blocks, dtype=np.int32)
        if present:
            self.num_layers_done[np.asarray(present, dtype=bool)] = num_layers

    @property
    def num_blocks(self) -> int:
        return len(self.num_layers_done)

    @property
    def is_complete(self) -> bool:
        return bool((self.num_layers_done == self.num_layers).all())

    def _require_inside(self, layer: int, first_block: int, num_blocks: int, num_layers: int) -> None:
        in_layers = 0 <= layer and 1 <= num_layers <= self.num_layers - layer
        if not (in_layers and 0 <= first_block and 1 <= num_blocks <= self.num_blocks - first_block):
            layers = f"layer {layer}" if num_layers == 1 else f"layers {layer}..{layer + num_layers - 1}"
            raise InvalidRequest(
                f"slice of {layers}, blocks {first_block}..{first_block + num_blocks - 1}: the lease has "
                f"{self.num_layers} layers and {self.num_blocks} blocks"
            )

    def check(self, layer: int, first_block: int, num_blocks: int, num_layers: int = 1) -> None:
        """Raises InvalidRequest where the slice lies outside, or does not begin with the next layer of each of its blocks."""
        self._require_inside(layer, first_block, num_blocks, num_layers)
        done = self.num_layers_done[first_block : first_block + num_blocks]
        wrong = np.flatnonzero(done != layer)
        if len(wrong):
            block = first_block + int(wrong[0])
            raise InvalidRequest(
                f"slice of layer {layer} for block {block}, which has {int(done[wrong[0]])} of {self.num_layers} layers; "
                "push the layers of a block once each, in ascending order"
            )

    def record(self, layer: int, first_block: int, num_blocks: int, num_layers: int = 1) -> None:
        """The slice is written. Raises as check does."""
        self.check(layer, first_block, num_blocks, num_layers)
        self.num_layers_done[first_block : first_block + num_blocks] += num_layers

    def take_back(self, first_block: int, num_blocks: int, num_layers: int) -> None:
        """The last num_layers layers recorded of these blocks are not written after all."""
        self.num_layers_done[first_block : first_block + num_blocks] -= num_layers

    def is_written(self, layer: int, first_block: int, num_blocks: int, num_layers: int) -> bool:
        """Raises InvalidRequest where the slice lies outside."""
        self._require_inside(layer, first_block, num_blocks, num_layers)
        return int(self.num_layers_done[first_block : first_block + num_blocks].min()) >= layer + num_layers

    def require_written(self, layer: int, first_block: int, num_blocks: int, num_layers: int) -> None:
        """Raises InvalidRequest where the slice lies outside, or is not written yet."""
        if not self.is_written(layer, first_block, num_blocks, num_layers):
            raise InvalidRequest(f"layers {layer}..{layer + num_layers - 1} of blocks from {first_block} on are not written yet")

    def require_complete(self, what: str) -> None:
        """Raises HandoffIncomplete naming the blocks and layers that are missing; what: the subject of the message."""
        missing = np.flatnonzero(self.num_layers_done != self.num_layers)
        if not len(missing):
            return
        first_missing = {int(block): int(self.num_layers_done[block]) for block in missing[:MAX_NAMED]}
        named = ", ".join(f"block {block} from layer {layer}" for block, layer in first_missing.items())
        more = f" and {len(missing) - MAX_NAMED} more blocks" if len(missing) > MAX_NAMED else ""
        raise HandoffIncomplete(
            f"{what} is incomplete: of {self.num_blocks} blocks with {self.num_layers} layers, missing are {named}{more}",
            num_missing_blocks=len(missing),
            first_missing_layer=first_missing,
        )


class SliceCursor:
    """Walks a growing Progress, lower layers first, so that a reader can start early."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._num_layers_sent = np.zeros(progress.num_blocks, dtype=np.int32)

    @property
    def is_complete(self) -> bool:
        return bool((self._num_layers_sent == self._progress.num_layers).all())

    def take(self, max_blocks: int, max_rows: int = 1) -> SliceRange | None:
        """The next slice of at most max_blocks blocks, of more than one layer only where blocks times layers are at most max_rows.

        None where all that is written has been taken.
        """
        sent, done = self._num_layers_sent, self._progress.num_layers_done
        pending = sent < done
        if not pending.any():
            return None
        layer = int(sent[pending].min())
        ready = pending & (sent == layer)
        first = int(ready.argmax())
        run = ready[first : first + max_blocks]
        num_blocks = len(run) if run.all() else int(run.argmin())
        num_layers = max(1, min(max_rows // num_blocks, int(done[first : first + num_blocks].min()) - layer))
        sent[first : first + num_blocks] += num_layers
        return SliceRange(layer, first, num_blocks, num_layers)
