"""The executor of a tensor-parallel group: rank 0 in the worker's process, the others in processes of their own.

step loop ─► chunks ─┬─► ranks 1 …: the same chunks, by a message ─► their engines ─┐
                     └─► rank 0's engine ──────── sums, gathers ────────────────────┴─► logits ─► rank 0 samples
transfers ─► RankPageTransfer: every rank its own heads

A rank that fails or ends takes the group with it: no rank knows any more where the others stand. That is a lost device, and told at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from ...protocol.config import ModelOptions
from ...protocol.errors import HalfmoonError, MachineError
from ..batch import check_chunks
from ..engine import Engine
from ..executor import DeviceLost, InFlightStep, Progress, PromptLogprobs
from ..gpus import visible_gpus
from ..kv_cache import PagedKVCache
from ..local_executor import LocalExecutor
from ..model_config import ModelConfig
from ..page_transfer import StepPush
from ..rank_group import Meeting
from ..resolve import resolve_device, resolve_folder
from ..sequence import Sequence, StepChunk
from ..shard import Shard
from ..transfer import TransferThread
from .memory import BUFFER_BYTES, SharedMemory, create_buffer
from .processes import RankProcesses
from .step_wire import Kind, StepWriter
from .transfer import RankPageTransfer

logger = logging.getLogger(__name__)


class TensorParallelExecutor(LocalExecutor):
    def __init__(
        self,
        engine: Engine,
        name: str,
        on_crash: Callable[[BaseException], None],
        *,
        shard: Shard,
        ranks: RankProcesses,
        memory: SharedMemory,
    ) -> None:
        """shard: rank 0's. memory: with the buffer that the ranks share."""
        self._ranks = ranks
        self._steps = StepWriter()

        def make_pages(cache: PagedKVCache, transfer: TransferThread) -> RankPageTransfer:
            return RankPageTransfer(cache, transfer, schema=engine.schema, shard=shard, ranks=ranks, steps=self._steps, memory=memory)

        super().__init__(engine, name, on_crash, make_pages)
        facts, size = self.facts, shard.size
        peak_flops = None if facts.peak_flops is None else size * facts.peak_flops
        self.facts = dataclasses.replace(facts, weight_bytes=size * facts.weight_bytes, peak_flops=peak_flops)

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes, in their order."""
        return self._ranks.pids

    @classmethod
    def load_group(
        cls,
        options: ModelOptions,
        size: int,
        *,
        kv_capacity_tokens: int,
        num_threads: int,
        max_decode_batch: int,
        cpu_prompts: int,
        name: str,
        progress: Progress,
        on_crash: Callable[[BaseException], None],
    ) -> TensorParallelExecutor:
        """size: ranks.

        As Engine.load; ConfigError for a model that size does not divide, MachineError for too few GPUs, or where a rank ended.
        """
        Shard(0, size).require_fits(ModelConfig.from_folder(resolve_folder(options)))
        load = {
            "kv_capacity_tokens": kv_capacity_tokens,
            "num_threads": num_threads,
            "max_decode_batch": max_decode_batch,
            "cpu_prompts": cpu_prompts,
        }
        environments = _environments(options, size)
        folder = tempfile.mkdtemp(prefix="halfmoon-ranks-")
        meeting = Path(folder) / "meeting"
        shared = {"size": size, "options": dataclasses.asdict(options), "load": load, "meeting": str(meeting)}
        buffer = create_buffer(BUFFER_BYTES)
        try:
            memory = SharedMemory(buffer)
            ranks = RankProcesses([{**shared, "rank": rank} for rank in range(1, size)], environments, buffer, on_crash)
            try:
                ranks.wait_started()
                engine = Engine.load(options, meeting=Meeting(Shard(0, size), meeting), progress=progress, **load)
                logger.info("%s", engine.described())
                return cls(engine, name, on_crash, shard=Shard(0, size), ranks=ranks, memory=memory)
            except HalfmoonError:
                ranks.close()
                raise
            except Exception as error:
                raise MachineError(f"the group of {size} ranks did not start: {_ended(ranks, error)}") from error
        finally:
            os.close(buffer)
            shutil.rmtree(folder)

    def find_not_finite(self, pages: Seq[int]) -> list[int]:
        """A rank's heads of a page may be sound where another's are not."""
        with self._together():
            self._ranks.step([Kind.FIND_NOT_FINITE, *pages])
            found = {page for answer in [self.engine.cache.find_not_finite(pages), *self._ranks.answers()] for page in answer}
        return [page for page in pages if page in found]

    def scrub(self, pages: Seq[int]) -> None:
        with self._together():
            self._ranks.step([Kind.SCRUB, *pages])
            self.engine.cache.scrub(pages)

    def close(self) -> None:
        super().close()
        self._ranks.close()

    def _compute(self, chunks: Seq[StepChunk], push: StepPush | None) -> tuple[torch.Tensor, dict[Sequence, PromptLogprobs]]:
        check_chunks(chunks, self.engine.page_size)  # what is wrong with them is said before any rank has begun
        with self._together():
            self._ranks.step(self._steps.write(Kind.RUN, chunks, push is not None))
            return super()._compute(chunks, push)

    def _launch(self, chunks: Seq[StepChunk], push: StepPush | None) -> InFlightStep | None:
        """The ranks come to the same answer, for they have the same graphs and chunks."""
        if not self.engine.row_counts:
            return None
        with self._together():
            self._ranks.step(self._steps.write(Kind.LAUNCH, chunks, push is not None))
            return super()._launch(chunks, push)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever fails in what all ranks do, ends the group. Raises DeviceLost."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            raise self._ranks.lost(error) from error


def _ended(ranks: RankProcesses, error: Exception) -> DeviceLost:
    return error if isinstance(error, DeviceLost) else ranks.lost(error)


def _environments(options: ModelOptions, size: int) -> list[dict[str, str]]:
    """Of the ranks from 1 on: each sees its own GPU alone, and rank 0 takes the first. Raises MachineError."""
    if resolve_device(options) == "cpu":
        return [{} for _ in range(1, size)]
    num_gpus = len(visible_gpus())
    if num_gpus < size:
        raise MachineError(f"a worker of {size} ranks needs as many GPUs, and this process has {num_gpus}", num_gpus=num_gpus)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(size)] if visible is None else visible.split(",")
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[1:size]]
