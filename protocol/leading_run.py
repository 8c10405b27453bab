"""How far a chain of blocks is held, asked with few questions. Pure, for the simulator's sake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

NUM_EXACT = 512


def leading_run(keys: Sequence[bytes], holds: Callable[[bytes], bool], num_exact: int = NUM_EXACT) -> int:
    """How many leading keys are held. The first num_exact are asked for one by one; after them the end is found by bisection.

    Whoever holds a chain gives up its end before its start, so beyond num_exact the answer is right as long as no block in the middle is
    lost. Then it may be too long: it is for those who find less when they ask for the blocks.
    """
    first = next((index for index, key in enumerate(islice(keys, num_exact)) if not holds(key)), num_exact)
    if first < num_exact:
        return first
    last = len(keys)
    while first < last:
        middle = (first + last) // 2
        if holds(keys[middle]):
            first = middle + 1
        else:
            last = middle
    return last
