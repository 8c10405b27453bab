"""What steps take on this machine, measured once at the load: where a worker's own measurements begin.

one prompt of nobody's: chunks of two sizes ─► a chunk behind them ─► a decode token behind little, behind much, and some at once
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

from ..protocol.blocks import div_ceil
from ..protocol.sampling import SamplingParams
from ..protocol.timing.step_cost import StepCost, attention_of
from .executor import Executor
from .page_allocator import PageAllocator
from .sequence import Sequence, StepChunk

SHORT, LONG = 64, 2048  # tokens of the two chunks
PATIENCE_S = 0.05  # that a chunk may take: a larger one is not tried
NUM_DECODES = 8
NUM_RUNS = 2  # of each step, the faster counts
TRIFLE_S = 1e-7  # a token that seems to cost nothing


def calibrate(executor: Executor, allocator: PageAllocator, max_chunk_tokens: int) -> StepCost:
    """Before any step of a request, on the thread that loaded the executor. Pages are given back.

    Where pages or the model's length hold no two chunks, the sizes are smaller and the figures rougher; they are learnt anyway.
    """
    facts = executor.facts
    room = min(allocator.num_free * facts.page_size, facts.max_model_len) - 1
    short = max(min(SHORT, room // 4), 1)
    most = max(min(LONG, max_chunk_tokens, room - short), short + 1)
    pages = allocator.allocate(min(div_ceil(short + most + 1, facts.page_size), allocator.num_free))
    try:
        return _measure(executor, pages, short, most)
    finally:
        allocator.free(pages)


def _measure(executor: Executor, pages: list[int], short: int, most: int) -> StepCost:
    def seconds(*chunks: tuple[int, int]) -> float:
        """Of a step of (start, tokens), each of a sequence of its own that ends there, on the same pages."""
        return min(_run_s(executor, [_chunk(pages, start, num_tokens) for start, num_tokens in chunks]) for _ in range(NUM_RUNS))

    short_s = seconds((0, short))
    long, long_s = 2 * short, 0.0
    while True:
        long = min(long, most)
        long_s = seconds((0, long))
        if long == most or long_s > PATIENCE_S:
            break
        long *= 2
    behind_s = seconds((long, short))
    few_s, much_s, many_s = seconds((short, 1)), seconds((long, 1)), seconds(*[(short, 1)] * NUM_DECODES)
    per_attention_s = max(behind_s - short_s, 0.0) / (short * long)
    products_s = long_s - short_s - (attention_of(long, 0) - attention_of(short, 0)) * per_attention_s
    per_token_s = max(products_s / (long - short), TRIFLE_S)
    return StepCost(
        read_s=few_s,
        chunk_s=long_s - attention_of(long, 0) * per_attention_s - long * per_token_s,
        per_token_s=per_token_s,
        per_attention_s=per_attention_s,
        per_decode_s=max(many_s - few_s, 0.0) / (NUM_DECODES - 1),
        per_context_s=max(much_s - few_s, 0.0) / (long - short),
    )


def _chunk(pages: list[int], start: int, num_tokens: int) -> StepChunk:
    sequence = Sequence("calibration", [0] * (start + num_tokens), start + num_tokens, SamplingParams(max_tokens=1), pages=pages)
    return StepChunk(sequence, start, num_tokens)


def _run_s(executor: Executor, chunks: Seq[StepChunk]) -> float:
    began = time.perf_counter()
    executor.run(chunks)
    return time.perf_counter() - began
