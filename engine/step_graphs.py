"""Every step that a CUDA graph can hold, launched one behind another: decode steps, and steps that compute chunks beside them or alone.

chunks ─► one token of each: DecodeGraphs ─┐
        └► others: MixedGraphs ────────────┴─► results ─► pinned ─► the host, when it asks
                     ▲                             │
                     └── the step behind takes its tokens from there: it may be launched while this one runs ◄──┘

Steps follow one another in one stream, so a copy waits for the step before to end, and tokens never have to pass the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch

from .decode_graph import DecodeGraphs, is_plain
from .decoder import Decoder, LayerHook
from .executor import DeviceLost
from .graph_sizes import batch_sizes
from .kv_cache import PagedKVCache
from .mixed_graph import MAX_CHUNKS, MixedGraphs
from .mixed_inputs import split_step
from .sequence import Sequence, StepChunk
from .staging import read_back
from .weights import Progress

NUM_RESULTS = 2  # the host reads one step's tokens while the next one's are still to come


class InFlight:
    """A step that was launched. To be read on the thread that launched it, at any time: a read one keeps its tokens.

    Args:
        tokens: int64 [chunks that sample], pinned; they stand there once `copied` is over.
    """

    def __init__(self, tokens: torch.Tensor, copied: torch.cuda.Event) -> None:
        self._pinned = tokens
        self._copied = copied
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        """One for each chunk that samples. Waits for this step alone, not for those behind it. Raises DeviceLost."""
        if self._tokens is None:
            try:
                self._copied.synchronize()
            except RuntimeError as error:
                raise DeviceLost(f"a step's tokens did not come: {error}") from error
            self._tokens = self._pinned.tolist()
        return self._tokens


class StepGraphs:
    """Not thread-safe. What run() gives is overwritten by the next run() or launch(), and all happens in one stream.

    Args:
        scratch_page: of the cache, for padding rows.
        max_batch: sequences in a decode step that a graph must hold, as far as BATCH_SIZES goes; 0: no decode steps.
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, cache: PagedKVCache, scratch_page: int, max_model_len: int, max_batch: int, progress: Progress | None = None
    ) -> None:
        sizes = batch_sizes(max_batch)
        max_decodes = sizes[-1] if sizes else 0
        num_results = max_decodes + MAX_CHUNKS
        self.decode: DecodeGraphs | None = None
        if sizes:
            self.decode = DecodeGraphs(decoder, cache, scratch_page, max_model_len, sizes, num_results, progress)
            self._results = self.decode.results
        else:
            self._results = torch.zeros(num_results, dtype=torch.int64, device=cache.data.device)
        self.mixed = MixedGraphs(decoder, cache, scratch_page, max_model_len, max_decodes, self._results, progress)
        self._pinned = [torch.zeros(num_results, dtype=torch.int64, pin_memory=True) for _ in range(NUM_RESULTS)]
        self._in_flight: list[InFlight | None] = [None] * NUM_RESULTS
        self._last_results: dict[Sequence, int] = {}  # of the last step, where it was launched: its tokens stand in the results
        self._logits: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._sequences: list[Sequence] = []

    def launch(self, chunks: Seq[StepChunk], after_layer: LayerHook | None = None) -> InFlight | None:
        """Starts a step and waits for nothing. None, and nothing begun, where no graph holds it or a token it samples isn't plain.

        A chunk of one token may begin where its sequence's tokens end: the step launched last gives that token. The pages for it
        are there.
        """
        sampled = sampled_chunks(chunks)
        if not all(is_plain(chunk) for chunk in sampled) or self._replay(chunks, self._last_results, after_layer) is None:
            return None
        self._last_results = {chunk.sequence: row for row, chunk in enumerate(sampled)}
        overwritten = self._in_flight.pop(0)
        if overwritten is not None:
            overwritten.tokens()
        self._pinned.append(self._pinned.pop(0))
        count, copied = len(sampled), torch.cuda.Event()
        tokens = self._pinned[-1][:count]
        if count:
            tokens.copy_(self._results[:count], non_blocking=True)
        copied.record()
        launched = InFlight(tokens, copied)
        self._in_flight.append(launched)
        return launched

    def run(self, chunks: Seq[StepChunk], after_layer: LayerHook | None = None) -> torch.Tensor | None:
        """fp32 logits [chunks that sample, vocab_size]; None where no graph holds the step."""
        logits = self._replay(chunks, {}, after_layer)
        if logits is None:
            return None
        sampled = sampled_chunks(chunks)
        self._logits = logits
        self._tokens = self._results[: len(sampled)] if all(is_plain(chunk) for chunk in sampled) else None
        self._sequences = [chunk.sequence for chunk in sampled]
        self._last_results = {}
        return logits

    def tokens(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[int] | None:
        """The tokens that the last run() drew, where logits and sequences are its own and logits need no change before the draw."""
        if logits is not self._logits or self._tokens is None or list(sequences) != self._sequences:
            return None
        return read_back(self._tokens).tolist()

    def _replay(self, chunks: Seq[StepChunk], last_results: Mapping[Sequence, int], after_layer: LayerHook | None) -> torch.Tensor | None:
        """The step's logits; its tokens, in the results. None, and nothing begun, where no graph holds it."""
        if not all(_is_known(chunk, last_results) for chunk in chunks):
            return None
        if self.decode is not None and after_layer is None and (size := self.decode.size(chunks)) is not None:
            self._logits = self._tokens = None
            return self.decode.replay(chunks, size, last_results)
        step = split_step(chunks)
        if not self.mixed.fits(step):
            return None
        self._logits = self._tokens = None
        return self.mixed.replay(step, last_results, after_layer)


def _is_known(chunk: StepChunk, last_results: Mapping[Sequence, int]) -> bool:
    """Its tokens are the sequence's, or the one behind them, which the step before gives."""
    num_unknown = chunk.start + chunk.num_tokens - len(chunk.sequence.token_ids)
    return num_unknown <= 0 or (num_unknown == chunk.num_tokens == 1 and chunk.sequence in last_results)


def sampled_chunks(chunks: Seq[StepChunk]) -> list[StepChunk]:
    """Those whose next token the step gives: the last of a sequence's tokens is computed, or one that the step before gives."""
    return [chunk for chunk in chunks if chunk.samples]
