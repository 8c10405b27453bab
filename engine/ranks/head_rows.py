"""Copies a rank's heads between its pages and rows of whole blocks in host memory.

row       [layer][k|v][rank 0's heads │ rank 1's heads │ …][token][head_dim]         a store's layout, whoever wrote it
pages     [layer][k|v][page][own heads][token][head_dim]

A rank's part of K, and of V, is contiguous: the device copies each with one strided copy for a run of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from ..kv_cache import PagedKVCache
from ..row_copy import copy_rows
from ..shard import Shard


def copy_out(cache: PagedKVCache, shard: Shard, layers: range, pages: Seq[int], runs: Seq[np.ndarray]) -> None:
    """Layers of pages into runs, uint8 [rows of the run, bytes of these layers of a block], in shared memory; on CUDA pinned, and
    asynchronous on the current stream."""
    if cache.on_cpu:
        for into, part in _parts(shard, layers, pages, runs):
            for place, layer in enumerate(layers):
                part[:, place] = cache.host_bytes(layer)[:, into].swapaxes(0, 1)
        return
    packed = cache.packed(layers, pages).view(len(pages), len(layers), 2, -1)
    start = 0
    for into, part in _parts(shard, layers, pages, [_pinned(cache, run) for run in runs]):
        for place in range(len(layers)):
            for half in range(2):
                copy_rows(part[:, place, half], packed[start : start + len(into), place, half])
        start += len(into)


def copy_in(cache: PagedKVCache, shard: Shard, layers: range, pages: Seq[int], runs: Seq[np.ndarray]) -> None:
    """The other way. On CUDA the runs have to stay until the stream gets there."""
    if cache.on_cpu:
        for into, part in _parts(shard, layers, pages, runs):
            for place, layer in enumerate(layers):
                cache.host_bytes(layer)[:, into] = part[:, place].swapaxes(0, 1)
        return
    staged = torch.empty((len(pages), len(layers) * cache.schema.layer_bytes), dtype=torch.uint8, device=cache.data.device)
    packed = staged.view(len(pages), len(layers), 2, -1)
    start = 0
    for into, part in _parts(shard, layers, pages, [_pinned(cache, run) for run in runs]):
        for place in range(len(layers)):
            for half in range(2):
                copy_rows(packed[start : start + len(into), place, half], part[:, place, half])
        start += len(into)
    cache.unpack(layers, pages, staged)


def _parts(shard: Shard, layers: range, pages: Seq[int], runs: Seq[Any]) -> list[tuple[list[int], Any]]:
    """(pages of the run, [rows, layers, k|v, bytes of the own heads]: a view of it)."""
    found: list[tuple[list[int], Any]] = []
    start = 0
    for run in runs:
        found.append((list(pages[start : start + len(run)]), run.reshape(len(run), len(layers), 2, shard.size, -1)[:, :, :, shard.rank]))
        start += len(run)
    return found


def _pinned(cache: PagedKVCache, run: np.ndarray) -> torch.Tensor:
    tensor = cache.pinned.tensor(run)
    if tensor is None:
        raise ValueError("these rows are not in pinned memory; copy by way of the worker's buffer")
    return tensor
