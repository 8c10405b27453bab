"""Steps of decode tokens and chunks as CUDA graphs, one a number of rows: what a step costs the host is filling one buffer and a launch.

step ─► MixedInputs (pinned) ──one copy──► static columns, block tables
results ─► tokens of the last step ─┐            └─► body of the next larger number of rows: decoder's layers ─► rows that sample
   ▲                                └─────────────────────┘     └─ layer l is done: an event, for whoever reads its pages
   └── head, draw: graphs of the next larger number of rows that sample ◄────────────────────────────────────────────┘

The kernels find sequences, lengths and pages on the device, so that one graph serves any mixture of its size; rows to spare are padding,
and sequences to spare have no rows. A step of more rows than the largest graph runs kernel by kernel from the same buffers: its host
time is then shorter than the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..kernels.sampling import likeliest, sampling
from .batch import TABLE_ALIGNMENT
from .decoder import Decoder, LayerHook
from .draw_columns import DRAW_COLUMNS
from .graph_sizes import MAX_CAPTURED_ROWS, batch_size_for, batch_sizes
from .kv_cache import PagedKVCache
from .mixed_inputs import MixedInputs, MixedSize, MixedStep, copy_tables, mixed_batch, views
from .sequence import Sequence
from .weights import Progress

MAX_CHUNKS = 16  # of a step; each that a graph has room for costs it a few us, whether it is there or not
MAX_CHUNK_TOKENS = 8192  # of a step; more run in another way
ROW_ALIGNMENT = 64  # of steps without a graph: kernels are compiled for how their numbers divide


def row_counts(most: int) -> tuple[int, ...]:
    """Rows of the graphs, for steps of up to `most` rows: at most an eighth of a large step is padding.

    A round number of chunk tokens beside a few decode tokens is the usual step: there is a graph just above each.
    """
    counts = sorted({16, 32, 64, 128, 1088, 2112, *range(192, 1024, 64), *range(1024, 2048, 128), *range(2048, MAX_CAPTURED_ROWS + 1, 256)})
    needed = [count for count in counts if count < most]
    return (*needed, *counts[len(needed) : len(needed) + 1])


class _Body(NamedTuple):
    graph: torch.cuda.CUDAGraph
    layer_done: list[torch.cuda.Event]


class _Head(NamedTuple):
    forward: torch.cuda.CUDAGraph
    draw: torch.cuda.CUDAGraph
    logits: torch.Tensor  # fp32 [rows, vocab_size]


class MixedGraphs:
    """Not thread-safe, and all happens in one stream.

    Args:
        scratch_page: of the cache, for padding rows.
        max_decodes: decode tokens in a step.
        results: int64, on the device: tokens of the last step, by the order of its chunks that sample.
        progress: called with ("capturing steps", graphs done, graphs in all).
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        scratch_page: int,
        max_model_len: int,
        max_decodes: int,
        results: torch.Tensor,
        progress: Progress | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._max_model_len = max_model_len
        self._results = results
        num_pages = -(-max_model_len // cache.page_size)
        self.size = MixedSize(
            num_rows=MAX_CHUNK_TOKENS + -(-max_decodes // ROW_ALIGNMENT) * ROW_ALIGNMENT,
            num_decodes=max_decodes,
            num_chunks=MAX_CHUNKS,
            num_results=max_decodes + MAX_CHUNKS,
            num_pages=-(-num_pages // TABLE_ALIGNMENT) * TABLE_ALIGNMENT,
        )
        device = cache.data.device
        pinned = torch.zeros(self.size.num_bytes, dtype=torch.uint8, pin_memory=True)
        self._pinned = pinned
        self._inputs = MixedInputs(pinned, self.size, cache.page_size, scratch_page * cache.page_size)
        self._staged = torch.zeros(self.size.num_bytes, dtype=torch.uint8, device=device)
        self._columns = views(self.size, self._staged)
        self._columns["slot_mapping"].fill_(scratch_page * cache.page_size)
        self._columns["top_ps"].fill_(1.0)
        self._table = torch.zeros((1 + MAX_CHUNKS + max_decodes, self.size.num_pages), dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event()
        self._side = torch.cuda.Stream(device)
        width = decoder.config.hidden_size
        dtype = decoder.weights.embed.dtype
        self._hidden, self._residual = (torch.zeros((self.size.num_results, width), dtype=dtype, device=device) for _ in range(2))
        self.row_counts = row_counts(MAX_CAPTURED_ROWS)
        self.head_sizes = batch_sizes(self.size.num_results)
        self._bodies: dict[int, _Body] = {}
        self._heads: dict[int, _Head] = {}
        self._capture_all(progress)

    def fits(self, step: MixedStep) -> bool:
        """Whether replay takes it: sequences have the pages for their tokens, and there are not too many of them."""
        if not step.num_rows or not self.size.fits(step) or len(step.sampled) > self.head_sizes[-1]:
            return False
        limit = self._max_model_len
        for chunk in (*step.decodes, *step.chunks):
            end = chunk.start + chunk.num_tokens
            if chunk.num_tokens < 1 or end > min(len(chunk.sequence.pages) * self._cache.page_size, limit):
                return False
        return True

    def replay(self, step: MixedStep, last_results: Mapping[Sequence, int], after_layer: LayerHook | None = None) -> torch.Tensor:
        """fp32 logits [len(step.sampled), vocab_size], overwritten by the next replay; the tokens drawn from them stand in the results.

        Waits for nothing that the device does but the copy of the step before.

        Args:
            last_results: sequences whose next token is a row of the results, and that row.
            after_layer: called with each layer, in a stream that has waited for its K and V to stand in the pages.
        """
        num_results = len(step.sampled)
        head_size = batch_size_for(num_results, self.head_sizes) or 0
        num_rows = batch_size_for(step.num_rows, self.row_counts) or -(-step.num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self._upload(step, num_rows, head_size, last_results)
        body = self._bodies.get(num_rows)
        if body is None:
            self._layers(num_rows, after_layer)
        else:
            body.graph.replay()
            if after_layer is not None:
                self._tell_layers(body, after_layer)
        if num_results == 0:
            return self._heads[self.head_sizes[0]].logits[:0]
        head = self._heads[head_size]
        head.forward.replay()
        if self._inputs.draws:
            head.draw.replay()
        return head.logits[:num_results]

    def _upload(self, step: MixedStep, num_rows: int, num_results: int, last_results: Mapping[Sequence, int]) -> None:
        self._copied.synchronize()  # the last step's copy may not have begun
        width = self._inputs.fill(step, num_rows, num_results, last_results)
        start = self._inputs.table_offset
        end = start + 4 * width * (len(step.chunks) + len(step.decodes))
        self._staged[:end].copy_(self._pinned[:end], non_blocking=True)
        self._copied.record()
        if width:
            copy_tables(self._staged[start:end].view(torch.int32), step, width, self.size, self._table)

    def _tell_layers(self, body: _Body, after_layer: LayerHook) -> None:
        with torch.cuda.stream(self._side):
            for layer, done in enumerate(body.layer_done):
                self._side.wait_event(done)
                after_layer(layer)

    def _layers(self, num_rows: int, after_layer: LayerHook | None = None) -> None:
        """The rows that sample, into the buffers that the heads read."""
        batch = mixed_batch(self._columns, self._table, self._results, self.size, num_rows, self._max_model_len)
        hidden, residual = self._decoder.layers(batch, self._cache, after_layer=after_layer)
        torch.index_select(hidden, 0, batch.last_rows, out=self._hidden)
        torch.index_select(residual, 0, batch.last_rows, out=self._residual)

    def _head(self, size: int) -> torch.Tensor:
        logits = self._decoder.head(self._hidden[:size], self._residual[:size])
        likeliest(logits, out=self._results[:size])
        return logits

    def _draw(self, logits: torch.Tensor) -> None:
        size = len(logits)
        self._results[:size].copy_(sampling(logits, *(self._columns[name][:size] for name in DRAW_COLUMNS)))

    def _capture_all(self, progress: Progress | None) -> None:
        """The largest first: its memory serves the others."""
        pool = torch.cuda.graph_pool_handle()
        work: list[tuple[Callable[[int, Any], None], int]] = [(self._capture_body, count) for count in reversed(self.row_counts)]
        work += [(self._capture_head, size) for size in reversed(self.head_sizes)]
        self._layers(MAX_CAPTURED_ROWS + ROW_ALIGNMENT)  # compiles what steps without a graph run
        for done, (capture, size) in enumerate(work):
            if progress is not None:
                progress("capturing steps", done, len(work))
            capture(size, pool)
        if progress is not None:
            progress("capturing steps", len(work), len(work))

    def _capture_body(self, num_rows: int, pool: Any) -> None:
        self._layers(num_rows)  # compiles what it needs
        graph = torch.cuda.CUDAGraph()
        done = [torch.cuda.Event(external=True) for _ in range(self._cache.schema.num_layers)]
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._layers(num_rows, lambda layer: done[layer].record())
        self._bodies[num_rows] = _Body(graph, done)

    def _capture_head(self, size: int, pool: Any) -> None:
        self._draw(self._head(size))
        forward, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
            logits = self._head(size)
        with torch.cuda.graph(draw, pool=pool, capture_error_mode="thread_local"):
            self._draw(logits)
        self._heads[size] = _Head(forward, draw, logits)
