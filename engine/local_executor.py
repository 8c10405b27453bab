"""The executor of one process: an Engine, its page cache, and the threads that copy pages in and out.

run:      forward, with after_layer where blocks are pushed ─► sample ─► the device is done      masks of grammars on a thread meanwhile
launch:   a CUDA graph, where one holds the step
Whatever they raise: does the device answer? ─► StepFailed, these chunks' matter ─ no: DeviceLost
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch

from ..protocol.config import ModelOptions
from .engine import Engine
from .executor import (
    BlockPush,
    DeviceLost,
    ExecutorFacts,
    InFlightStep,
    PageTransfer,
    Progress,
    PromptLogprobs,
    StepFailed,
    StepOutcome,
)
from .kv_cache import PagedKVCache
from .model_flops import ModelFlops, peak_flops
from .page_transfer import LocalPageTransfer, StepPush
from .sequence import Sequence, StepChunk
from .token_masks import MaskMaker
from .transfer import TransferThread


class LocalExecutor:
    def __init__(
        self,
        engine: Engine,
        name: str,
        on_crash: Callable[[BaseException], None],
        make_pages: Callable[[PagedKVCache, TransferThread], LocalPageTransfer] = LocalPageTransfer,
    ) -> None:
        """name: of the threads. on_crash: told, on one of them, what broke a transfer."""
        self.engine = engine
        config = engine.config
        self.facts = ExecutorFacts(
            schema=engine.schema,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            max_model_len=engine.max_model_len,
            num_pages=engine.cache.num_pages,
            device=str(engine.device),
            weight_bytes=engine.weight_bytes,
            flops=ModelFlops.of_model(config),
            peak_flops=_peak_flops(engine),
            row_counts=engine.row_counts,
        )
        self._pages = make_pages(engine.cache, TransferThread(f"{name}-transfer", engine.device, on_crash))
        self.pages: PageTransfer = self._pages
        self._masks = MaskMaker(config.vocab_size, f"{name}-masks")

    @classmethod
    def load(
        cls,
        options: ModelOptions,
        *,
        kv_capacity_tokens: int,
        num_threads: int,
        max_decode_batch: int,
        cpu_prompts: int,
        name: str,
        progress: Progress,
        on_crash: Callable[[BaseException], None],
    ) -> LocalExecutor:
        """Raises what Engine.load raises."""
        engine = Engine.load(
            options,
            kv_capacity_tokens=kv_capacity_tokens,
            num_threads=num_threads,
            max_decode_batch=max_decode_batch,
            cpu_prompts=cpu_prompts,
            progress=progress,
        )
        return cls(engine, name, on_crash)

    def run(self, chunks: Seq[StepChunk], pushes: Seq[BlockPush] = ()) -> StepOutcome:
        engine, sampled = self.engine, [chunk.sequence for chunk in chunks if chunk.is_last]
        push = self._pages.after_layer(pushes) if pushes else None
        with self._typed(push):
            masks = self._masks.begin(sampled)
            logits, scored = self._compute(chunks, push)
            samples = engine.sample(logits, sampled, None if masks is None else masks.result()) if sampled else []
            if engine.device.type == "cuda":
                # a page that is freed after the step may be another's at once
                torch.cuda.current_stream(engine.device).synchronize()
        return StepOutcome(samples, scored)

    def launch(self, chunks: Seq[StepChunk], pushes: Seq[BlockPush] = ()) -> InFlightStep | None:
        push = self._pages.after_layer(pushes) if pushes else None
        with self._typed(push):
            return self._launch(chunks, push)

    def find_not_finite(self, pages: Seq[int]) -> list[int]:
        with self._typed(None):
            return self.engine.cache.find_not_finite(pages)

    def scrub(self, pages: Seq[int]) -> None:
        with self._typed(None):
            self.engine.cache.scrub(pages)

    def close(self) -> None:
        self.pages.close()
        self._masks.close()

    def _compute(self, chunks: Seq[StepChunk], push: StepPush | None) -> tuple[torch.Tensor, dict[Sequence, PromptLogprobs]]:
        return self.engine.compute(chunks, after_layer=push)

    def _launch(self, chunks: Seq[StepChunk], push: StepPush | None) -> InFlightStep | None:
        return self.engine.launch(chunks, after_layer=push)

    @contextlib.contextmanager
    def _typed(self, push: StepPush | None) -> Iterator[None]:
        """Whatever computing raises, as StepFailed or DeviceLost."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self.engine.device.type == "cuda":
                self._require_device(error)
            raise StepFailed(reason, 0 if push is None else push.num_layers) from error

    def _require_device(self, error: Exception) -> None:
        """Asks the device itself: whatever ended its context, it answers nothing any more. Raises DeviceLost."""
        try:
            torch.cuda.synchronize(self.engine.device)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()  # in other pieces than those that were too few
        except RuntimeError as lost:
            raise DeviceLost(f"{self.engine.device} is lost: {error}") from lost


def _peak_flops(engine: Engine) -> float | None:
    if engine.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(engine.device), engine.compute_dtype)
