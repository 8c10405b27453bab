"""Paged inputs for attention, and dense attention in fp64, one query at a time, that knows nothing of pages."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Paged:
    """The inputs of the attention kernels, and beside them the dense K and V of each sequence: [kv_len, num_kv_heads, head_dim]."""

    q: torch.Tensor
    kv_pages: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    max_seqlen_q: int
    max_kv_len: int
    dense: list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interpreter_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces triton.language's functions at a launch, and again at each call of a @triton.jit function inside
    it, which takes half of the time and changes nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter._LangPatchScope(), set[str]()

    def once(function: Any) -> Any:
        """Of the modules that function sees; all are put back at the end of the launch."""
        if not launch._changes:
            done.clear()
        modules = (interpreter.tl, interpreter.tl.core)
        seen = {value.__name__ for value in function.__globals__.values() if any(value is module for module in modules)}
        if not seen <= done:
            done.update(seen)
            launch._changes += patch(function)._changes
        return launch

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


@pytest.fixture
def paged() -> Callable[..., Paged]:
    def make(
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        heads: tuple[int, int],
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> Paged:
        """Pages in random order, filled with large numbers wherever no sequence has a token."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, num_kv_heads = heads
        counts = [math.ceil(length / page_size) for length in kv_lens]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        kv_pages = torch.full((2, len(order), num_kv_heads, page_size, head_dim), 1e4)
        block_table = torch.zeros(len(kv_lens), max([*counts, 1]) + 2, dtype=torch.int32)
        dense = []
        for row, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
            pages = [order.pop() for _ in range(count)]
            block_table[row, :count] = torch.tensor(pages, dtype=torch.int32)
            k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype).unbind(0)
            for token in range(length):
                kv_pages[0, pages[token // page_size], :, token % page_size] = k[token]
                kv_pages[1, pages[token // page_size], :, token % page_size] = v[token]
            dense.append((k, v))
        q = torch.randn(sum(q_lens), num_heads, head_dim, generator=generator).to(dtype)
        starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
        lens = torch.tensor(kv_lens, dtype=torch.int32)
        return Paged(q, kv_pages.to(dtype), block_table, starts, lens, max(q_lens), max(kv_lens), dense)

    return make


@pytest.fixture
def naive_attention() -> Callable[..., torch.Tensor]:
    def attend(inputs: Paged, scale: float, sliding_window: int = 0, logit_soft_cap: float = 0.0, causal: bool = True) -> torch.Tensor:
        rows = []
        bounds = inputs.cu_seqlens_q.tolist()
        for index, (k, v) in enumerate(inputs.dense):
            q_len = bounds[index + 1] - bounds[index]
            for token in range(q_len):
                query = inputs.q[bounds[index] + token].double()
                position = len(k) - q_len + token
                last = position if causal else len(k) - 1
                keys = [j for j in range(last + 1) if sliding_window == 0 or j > position - sliding_window]
                heads = []
                for head in range(query.shape[0]):
                    shared = head // (query.shape[0] // k.shape[1])
                    scores = k[keys, shared].double() @ query[head] * scale
                    if logit_soft_cap:
                        scores = logit_soft_cap * torch.tanh(scores / logit_soft_cap)
                    heads.append(torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum() @ v[keys, shared].double())
                rows.append(torch.stack(heads))
        return torch.stack(rows)

    return attend
