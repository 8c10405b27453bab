"""A mixture of experts: the reference, which CPUs use, and the Triton kernels, in the interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.experts import route  # noqa: E402
from halfmoon.kernels.portable.expert_tiles import expert_tiles, max_tiles  # noqa: E402
from halfmoon.kernels.portable.experts import experts as by_tiles  # noqa: E402
from halfmoon.kernels.portable.experts import tile_of  # noqa: E402
from halfmoon.kernels.reference.experts import experts as in_torch  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * CUDA
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 48, 40


def chosen_of(kind: str, num_tokens: int) -> torch.Tensor:
    if kind == "two alone":
        return torch.tensor([[4, 1]]).repeat(num_tokens, 1)
    if kind == "the last of all":
        return torch.stack([torch.arange(num_tokens) % (NUM_EXPERTS - 1), torch.full((num_tokens,), NUM_EXPERTS - 1)], dim=1)
    return torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)])


def in_double(x, gate_up, down, weights, chosen) -> torch.Tensor:
    """One pair at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for place in range(chosen.shape[1]):
            expert = int(chosen[token, place])
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += float(weights[token, place]) * (down[expert].double() @ (gate * gate.sigmoid() * up))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "num_tokens"), [("any", 1), ("any", 19), ("two alone", 20), ("the last of all", 7), ("any", 70)])
def test_each_token_has_the_sum_of_its_experts(kind: str, num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    x, chosen = torch.randn(num_tokens, HIDDEN).to(dtype), chosen_of(kind, num_tokens)
    gate_up = (torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(dtype)
    down = (torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).to(dtype)
    weights = torch.rand(num_tokens, TOP_K)
    wanted = in_double(x, gate_up, down, weights, chosen)
    for way, device in ((in_torch, "cpu"), (by_tiles, DEVICE)):
        out = way(*(tensor.to(device) for tensor in (x, gate_up, down, weights, chosen))).cpu()
        assert out.dtype == dtype and out.shape == x.shape
        assert (out.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm(), way


def test_widths_that_are_whole_blocks_are_read_without_masks() -> None:
    torch.manual_seed(1)
    x, chosen = torch.randn(3, 64), chosen_of("any", 3)
    others = torch.randn(NUM_EXPERTS, 128, 64), torch.randn(NUM_EXPERTS, 64, 64), torch.rand(3, TOP_K), chosen
    out = by_tiles(*(tensor.to(DEVICE) for tensor in (x, *others))).cpu()
    torch.testing.assert_close(out, in_torch(x, *others), rtol=1e-4, atol=1e-3)


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    torch.manual_seed(0)
    x, chosen = torch.randn(5, 2 * HIDDEN)[:, :HIDDEN], chosen_of("any", 5)
    others = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN, WIDTH), torch.rand(5, TOP_K), chosen
    out = by_tiles(x.to(DEVICE), *(tensor.to(DEVICE) for tensor in others)).cpu()
    torch.testing.assert_close(out, in_torch(x, *others), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "num_tokens", "block_m"), [("any", 50, 16), ("two alone", 40, 16), ("the last of all", 3, 16)])
def test_tiles_hold_every_pair_once_by_expert_and_in_the_tokens_order(kind: str, num_tokens: int, block_m: int) -> None:
    chosen = chosen_of(kind, num_tokens)
    pairs, tiles = (tensor.cpu() for tensor in expert_tiles(chosen.to(DEVICE), NUM_EXPERTS, block_m))
    assert pairs.tolist() == chosen.flatten().argsort(stable=True).tolist()
    found = []
    for expert, place, count in tiles.T.tolist():
        assert 0 <= count <= block_m
        own = pairs[place : place + count].tolist() if count else []
        assert all(chosen.flatten()[pair] == expert for pair in own)
        found += own
    assert found == pairs.tolist()


def test_there_are_tiles_for_any_spread_of_pairs() -> None:
    for num_pairs, counts in ((1, (1,)), (4, (1, 1, 1, 1)), (40, (1, 1, 1, 1, 1, 35)), (130, (33, 17, 17, 17, 17, 29))):
        needed = sum(-(-count // 16) for count in counts)
        assert needed <= max_tiles(num_pairs, NUM_EXPERTS, 16)
    assert max_tiles(130, NUM_EXPERTS, 16) == 6 + 124 // 16


def test_a_tile_grows_with_the_tokens_of_an_expert_and_fits_the_device() -> None:
    tiles = [tile_of(num_tokens * 8, 128, 2, 232448) for num_tokens in (1, 128, 512, 1024, 8192)]
    assert [tile.block_m for tile in tiles] == [16, 16, 32, 64, 128]
    for shared in (101376, 166912, 232448):
        for num_tokens in (1, 512, 1024, 8192):
            for size in (2, 4):
                tile = tile_of(num_tokens * 8, 128, size, shared)
                assert (tile.block_m + max(2 * tile.gate_n, tile.down_n)) * tile.block_k * size * tile.num_stages <= shared


def test_weights_are_the_softmax_over_all_experts_normalised_if_asked() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float16)
    weights, chosen = route(logits, 2, False)
    everything = [2.718281828**value for value in (0, 3, 1, 2)]
    assert chosen[0].tolist() == [1, 3] and weights.dtype == torch.float32
    assert weights[0].tolist() == pytest.approx([everything[1] / sum(everything), everything[3] / sum(everything)], rel=1e-5)
    assert chosen[1].tolist() == torch.topk(torch.ones(1, 4), 2).indices[0].tolist()
    normalised, _ = route(logits, 2, True)
    assert normalised.sum(dim=-1).tolist() == pytest.approx([1.0, 1.0])
    assert float(normalised[0, 0] / normalised[0, 1]) == pytest.approx(2.718281828, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_graph_routes_other_tokens_than_it_was_captured_with() -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16), torch.randn(33, 16, device="cuda")
    gate_up, down = torch.randn(16, 256, 256, device="cuda").bfloat16() / 16, torch.randn(16, 256, 128, device="cuda").bfloat16() / 16
    by_tiles(x, gate_up, down, *route(logits, 4, True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = by_tiles(x, gate_up, down, *route(logits, 4, True))
    for _ in range(5):
        x.normal_()
        logits.normal_()
        graph.replay()
        wanted = in_torch(x, gate_up, down, *route(logits, 4, True))
        assert (found.float() - wanted.float()).norm() <= 2e-2 * wanted.float().norm()
