"""Which way each quantised product goes, by the number of its tokens: measured on this device when the weights are loaded.

matrices of one form ─► tokens 1, 2, 4 … 8,192 ─► each way over some layers' matrices, as a graph ─► the fastest, for all of the form
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from .executor import Progress
from .linears import MAX_TOKENS, DenseLinear, Linear, size_class

NUM_MATRICES = 4  # of a form, one after another: a step finds none in the cache
NUM_REPLAYS = 3


def choose_ways(
    linears: Iterable[Linear],
    dtype: torch.dtype,
    progress: Progress | None = None,
    measure_ms: Callable[[Callable[[], None]], float] | None = None,
) -> None:
    """Fills the ways of the quantised ones. dtype: of their inputs. measure_ms: of a call; absent: by CUDA graphs."""
    measure_ms = measure_ms or graph_ms
    forms: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        if not isinstance(linear, DenseLinear):
            forms.setdefault(_form(linear), []).append(linear)
    counts = [1 << bits for bits in range(MAX_TOKENS.bit_length())]
    for done, (form, num_tokens) in enumerate(itertools.product(forms, counts)):
        if progress is not None:
            progress("measuring products", done, len(forms) * len(counts))
        way = _fastest(forms[form][:NUM_MATRICES], num_tokens, dtype, measure_ms)
        for linear in forms[form]:
            linear.ways[size_class(num_tokens)] = way
    if progress is not None:
        progress("measuring products", len(forms) * len(counts), len(forms) * len(counts))


def _form(linear: Linear) -> tuple[object, ...]:
    return type(linear), *((tensor.dtype, tensor.shape) for tensor in linear.tensors())


def _fastest(linears: list[Linear], num_tokens: int, dtype: torch.dtype, measure_ms: Callable[[Callable[[], None]], float]) -> str:
    x = torch.randn(num_tokens, linears[0].num_in, device=linears[0].weight.device).to(dtype)
    candidates = linears[0].candidates(x)
    if len(candidates) == 1:
        return candidates[0]

    def run(way: str) -> None:
        for linear in linears:
            linear.product(x, way)

    return min(candidates, key=lambda way: measure_ms(lambda: run(way)))


def graph_ms(run: Callable[[], None]) -> float:
    """The least of some replays, so that launches cost what they cost in a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles what it needs
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(NUM_REPLAYS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return min(times)
