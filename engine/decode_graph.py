"""Decode steps as CUDA graphs, one a batch size: what a step costs the host is filling one buffer and a launch.

sequences ─► DecodeInputs (pinned) ──one copy──► static columns, block table
   feed ─► token_ids ─┐                              └─► graph of the next larger batch size: decoder ─► logits ─► greedy tokens ─► feed
     ▲                └──────────────────────────────────────┘ └─► graph of the draw, where one is not greedy ─► tokens ─► feed ─► host
     └── the step behind takes them from there ──────────────────────────────────────────────────────────────────────────┘

Steps follow one another in one stream, so one may be launched while the one before runs: its copy waits for the graph to end, and
its tokens never pass the host. Rows beyond the sequences are padding: they attend to nothing and write to a page of the cache that
belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch

from ..kernels.dispatch import implementation
from ..kernels.sampling import likeliest, sampling
from .batch import StepBatch
from .decode_inputs import COLUMNS, DecodeInputs, buffer_bytes, column_offsets, feed_start
from .decoder import Decoder
from .graph_sizes import batch_size_for
from .kv_cache import PagedKVCache
from .sequence import Sequence, StepChunk
from .staging import DTYPES
from .weights import Progress

KERNELS = ("linear", "narrow_linear", "int4_linear", "paged_decode", "flash_prefill", "kv_write", "rms_norm", "silu_mul", "sampling")
"""Some of their torch references read values back to the host, which a graph can't hold."""


def is_plain(chunk: StepChunk) -> bool:
    """The next token follows from logits and columns alone: no penalty, bias, ban, grammar or logprob is asked for."""
    params = chunk.sequence.sampling
    num_output_tokens = chunk.start + chunk.num_tokens - chunk.sequence.num_prompt_tokens
    changes = params.needs_penalties or params.logit_bias or params.num_logprobs is not None or params.grammar is not None
    return not changes and num_output_tokens >= params.min_tokens


def can_capture(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return not any(implementation(stem, device).__module__.rpartition(".")[0].endswith(".reference") for stem in KERNELS)


class _Captured(NamedTuple):
    forward: torch.cuda.CUDAGraph
    draw: torch.cuda.CUDAGraph
    logits: torch.Tensor  # fp32 [batch size, vocab_size]


class DecodeGraphs:
    """Not thread-safe, and all happens in one stream.

    Args:
        scratch_page: of the cache, for padding rows.
        sizes: batch sizes to capture, ascending.
        num_results: tokens of a step of any kind, at least sizes[-1].
        progress: called with ("capturing graphs", graphs done, graphs in all).
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        scratch_page: int,
        max_model_len: int,
        sizes: tuple[int, ...],
        num_results: int,
        progress: Progress | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._max_model_len = max_model_len
        self._page_size = cache.page_size
        self.sizes = sizes
        largest, device = self.sizes[-1], cache.data.device
        max_pages = -(-max_model_len // cache.page_size)
        num_bytes = buffer_bytes(largest, max_pages)
        self._pinned = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        start = feed_start(num_results)
        held = torch.zeros(8 * start + num_bytes, dtype=torch.uint8, device=device)
        self._feed = held[: 8 * (start + largest)].view(torch.int64)
        self._staged = held[8 * start :]
        self.results = self._feed[:num_results]
        self._inputs = DecodeInputs(self._pinned.numpy(), largest, max_pages, cache.page_size, scratch_page * cache.page_size, num_results)
        offsets, self._table_offset = column_offsets(largest)
        self._columns = {
            name: self._staged[offsets[name] : offsets[name] + dtype.itemsize * largest].view(DTYPES[dtype])
            for name, dtype in COLUMNS.items()
        }
        self._columns["slot_mapping"].fill_(scratch_page * cache.page_size)
        self._columns["top_ps"].fill_(1.0)
        self._table = torch.zeros((largest, max_pages), dtype=torch.int32, device=device)
        self._cu_seqlens = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(largest, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event()
        self._captured = self._capture_all(progress)

    def size(self, chunks: Seq[StepChunk]) -> int | None:
        """Of the graph that holds the step: one token of each of a batch, the last that it has or one that the step before gives."""
        size = batch_size_for(len(chunks), self.sizes)
        if size is None or not chunks:
            return None
        for sequence, start, num_tokens in chunks:
            num_known, num_all = len(sequence.token_ids), start + 1
            if num_tokens != 1 or num_all not in (num_known, num_known + 1):
                return None
            if num_all > min(len(sequence.pages) * self._page_size, self._max_model_len):
                return None
        return size

    def replay(self, chunks: Seq[StepChunk], size: int, last_rows: Mapping[Sequence, int]) -> torch.Tensor:
        """fp32 logits [len(chunks), vocab_size], overwritten by the next replay; the tokens drawn from them stand in the results.

        Args:
            last_rows: sequences whose next token is a row of the results, and that row.
        """
        sequences, count = [chunk.sequence for chunk in chunks], len(chunks)
        rows = [last_rows[sequence] if start == len(sequence.token_ids) else None for sequence, start, _ in chunks]
        self._copied.synchronize()  # the last step's copy may not have begun
        width = self._inputs.fill(sequences, size, rows)
        end = self._table_offset + 4 * count * width
        self._staged[:end].copy_(self._pinned[:end], non_blocking=True)
        self._copied.record()
        if width:
            self._table[:count, :width].copy_(self._staged[self._table_offset : end].view(torch.int32).view(count, width))
        captured = self._captured[size]
        captured.forward.replay()
        if self._inputs.draws:
            captured.draw.replay()
        return captured.logits[:count]

    def _capture_all(self, progress: Progress | None) -> dict[int, _Captured]:
        """The largest first: its memory serves the others."""
        pool = torch.cuda.graph_pool_handle()
        captured = {}
        for done, size in enumerate(reversed(self.sizes)):
            if progress is not None:
                progress("capturing graphs", done, len(self.sizes))
            captured[size] = self._capture(size, pool)
        if progress is not None:
            progress("capturing graphs", len(self.sizes), len(self.sizes))
        return captured

    def _capture(self, size: int, pool: Any) -> _Captured:
        self._draw(self._forward(size))  # compiles what it needs
        forward, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # other threads, of other engines say, may go on with their work
        with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
            logits = self._forward(size)
        with torch.cuda.graph(draw, pool=pool, capture_error_mode="thread_local"):
            self._draw(logits)
        return _Captured(forward, draw, logits)

    def _forward(self, size: int) -> torch.Tensor:
        """Logits; the greedy tokens, in the feed."""
        logits = self._decoder.forward(self._batch(size), self._cache)
        likeliest(logits, out=self._feed[:size])
        return logits

    def _draw(self, logits: torch.Tensor) -> None:
        """Into the feed."""
        names = ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "indices")
        self._feed[: len(logits)].copy_(sampling(logits, *(self._columns[name][: len(logits)] for name in names)))

    def _batch(self, size: int) -> StepBatch:
        return StepBatch(
            token_ids=self._feed.index_select(0, self._columns["sources"][:size]),
            positions=self._columns["positions"][:size],
            slot_mapping=self._columns["slot_mapping"][:size],
            block_table=self._table[:size],
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            kv_lens=self._columns["kv_lens"][:size],
            last_rows=self._rows[:size],
            max_seqlen_q=1,
            max_kv_len=self._max_model_len,
        )
