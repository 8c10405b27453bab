"""A mixture of experts at Qwen3-30B-A3B's shape, from one token to a long prefill: grouped products with all that sorts tokens for them.

    halfmoon bench experts [--check] [--quick] [--out FILE]

--check: against fp32 in torch first, spread evenly, by chance and to a few experts, eager and as a graph that is replayed for another
routing; nothing is timed where one is wrong. TFLOP/s count the chosen experts' products, GB/s the experts that are hit and the tokens,
once. Each time is of a graph of layers that have weights of their own, 1.2 GB each. vLLM's fused_experts stands beside it where it can be
imported, on the same inputs.
"""

from __future__ import annotations

from functools import partial

import measure
import torch
from measure import Calls, Case, Row

from halfmoon.kernels.experts import route
from halfmoon.kernels.portable.experts import experts
from halfmoon.kernels.reference.experts import experts as in_torch

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 128, 8, 2048, 768
TOKENS = tuple(1 << bits for bits in range(14))  # 1 to 8192
QUICK = (1, 8, 64, 512, 2048, 8192)
NUM_LAYERS = 2
BF16 = torch.bfloat16
LIMIT = 2e-2
Weights = tuple[torch.Tensor, torch.Tensor]


def weights(num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> Weights:
    """gate_up and down."""
    gate_up = torch.randn(num_experts, 2 * width, hidden, device="cuda", dtype=dtype) / hidden**0.5
    return gate_up, torch.randn(num_experts, hidden, width, device="cuda", dtype=dtype) / width**0.5


def routing(kind: str, num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    if kind == "few":
        logits[:, top_k:] -= 30.0
    if kind == "even":
        token, expert = torch.arange(num_tokens, device="cuda")[:, None], torch.arange(num_experts, device="cuda")
        logits = -(((expert - token * top_k) % num_experts).float())
    return route(logits, top_k, True)


def check(seed: int) -> list[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(seed)
    rows = []
    for dtype in (BF16, torch.float16, torch.float32):
        for shape in ((NUM_EXPERTS, HIDDEN, WIDTH, TOP_K), (8, 1000, 328, 2), (16, 512, 96, 1)):
            for num_tokens in (1, 7, 129, 1000, 2500):
                rows.append(check_shape(shape, num_tokens, dtype))
                torch.cuda.empty_cache()
    return rows


def check_shape(shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype) -> Row:
    num_experts, hidden, width, top_k = shape
    gate_up, down = weights(num_experts, hidden, width, dtype)
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=dtype)
    shares, chosen = routing("any", num_tokens, num_experts, top_k)
    out: list[torch.Tensor] = []

    def run() -> None:
        out[:] = [experts(x, gate_up, down, shares, chosen)]

    replay = measure.captured(run)
    errors = {"eager": 0.0, "graph": 0.0}
    for kind in ("any", "even", "few"):
        for tensor, other in zip((shares, chosen), routing(kind, num_tokens, num_experts, top_k), strict=True):
            tensor.copy_(other)
        reference = in_torch(x.float(), gate_up.float(), down.float(), shares, chosen)
        replay()
        errors["graph"] = max(errors["graph"], measure.relative_error(out[0], reference))
        errors["eager"] = max(errors["eager"], measure.relative_error(experts(x, gate_up, down, shares, chosen), reference))
    kind = str(dtype).removeprefix("torch.")
    return measure.checked(f"{kind} {shape}, {num_tokens} tokens", errors, LIMIT if dtype != torch.float32 else 1e-4)


def run(num_tokens: int, case: str) -> Row:
    layers = [weights(NUM_EXPERTS, HIDDEN, WIDTH, BF16) for _ in range(NUM_LAYERS)]
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=BF16)
    routings = [routing("any", num_tokens, NUM_EXPERTS, TOP_K) for _ in layers]
    num_hit = sum(len(chosen.unique()) for _, chosen in routings) / NUM_LAYERS
    flops = 2.0 * num_tokens * TOP_K * 3 * HIDDEN * WIDTH
    num_bytes = 2.0 * (num_hit * 3 * HIDDEN * WIDTH + 2 * num_tokens * HIDDEN)
    calls = [partial(experts, x, *layer, *given) for layer, given in zip(layers, routings, strict=True)]
    graphs: Calls = {"portable": measure.captured(*calls)}
    if theirs := vllm_calls(x, layers, routings):
        graphs["vllm"] = measure.captured(*theirs)
    times = {name: ms / NUM_LAYERS for name, ms in measure.interleaved(graphs).items()}
    compute = num_tokens * TOP_K / NUM_EXPERTS >= 128
    return measure.timed("experts", case, flops, num_bytes, times, compute=compute, num_hit=num_hit)


def vllm_calls(x: torch.Tensor, layers: list[Weights], routings: list[tuple[torch.Tensor, torch.Tensor]]) -> list[partial[torch.Tensor]]:
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        measure.note_absent("vllm", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return []
    # a layer's int32 choice, as vLLM's own routing has it
    calls = [partial(fused_experts, x, *layer, shares, chosen.int()) for layer, (shares, chosen) in zip(layers, routings, strict=True)]
    return calls if measure.present({"vllm": calls[0]}) else []


def cases(quick: bool) -> list[Case]:
    found = {f"{num_tokens} tokens": num_tokens for num_tokens in (QUICK if quick else TOKENS)}
    return [Case("experts", name, partial(run, num_tokens, name)) for name, num_tokens in found.items()]


if __name__ == "__main__":
    measure.main(__doc__, cases, check)
