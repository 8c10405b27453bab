"""The Triton linear layer of a single token: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.portable.linear import linear  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def inputs(num_in: int, num_out: int, dtype: torch.dtype, biased: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(num_in + num_out)
    bias = torch.randn(num_out).to(dtype) if biased else None
    return torch.randn(1, num_in).to(dtype), (torch.randn(num_out, num_in) / num_in**0.5).to(dtype), bias


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: bool) -> torch.Tensor:
    return linear(x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE), **options).cpu()


def close(out: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> bool:
    assert out.dtype == dtype and out.shape == wanted.shape
    return bool((out.double() - wanted).norm() <= roundings * TOLERANCE[dtype] * wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(2048, 16), (1024, 12), (300, 7), (2500, 10), (64, 5)])
def test_one_tokens_products_are_those_of_fp64(num_in, num_out, biased, dtype):
    x, weight, bias = inputs(num_in, num_out, dtype, biased)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert close(run(x, weight, bias), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(2048, 16), (300, 14), (1100, 10)])
def test_gate_and_up_are_multiplied(num_in, num_out, biased, dtype):
    x, weight, bias = inputs(num_in, num_out, dtype, biased)
    gate, up = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).chunk(2, dim=1)
    assert close(run(x, weight, bias, gated=True), torch.nn.functional.silu(gate) * up, dtype, 3)


def test_several_tokens_are_computed_as_well():
    x, weight, _ = inputs(96, 8, torch.float32, False)
    x = torch.cat([x, 2 * x, x + 1])
    assert torch.allclose(run(x, weight, None), x @ weight.T, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote():
    """Each layer starts before the one before it has ended; 200 in a row must not read an x that is not there yet."""
    torch.manual_seed(0)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(4)]

    def chain() -> torch.Tensor:
        out = x
        for step in range(200):
            out = linear(out, weights[step % 4])
            if step % 5 == 0:
                out = out / out.norm() * 64
        return out

    wanted = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)
