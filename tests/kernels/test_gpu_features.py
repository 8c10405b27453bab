"""On a GPU, at sizes that fill it: every feature of the kernels in bf16, through the function that serving calls, against torch in fp32.

The references are tested against fp64 elsewhere. Here a bf16 result may be off by 5e-3, two roundings of an average value, and no more.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from halfmoon.engine.kv_cache import PagedKVCache
from halfmoon.kernels.flash_prefill import flash_prefill
from halfmoon.kernels.kv_pack import kv_pack, kv_unpack
from halfmoon.kernels.kv_write import kv_write
from halfmoon.kernels.paged_decode import paged_decode
from halfmoon.kernels.portable import flash_prefill as portable
from halfmoon.kernels.portable import fp8
from halfmoon.kernels.reference import flash_prefill as prefill_in_torch
from halfmoon.kernels.reference import kv_write as write_in_torch
from halfmoon.kernels.reference import paged_decode as decode_in_torch
from halfmoon.kernels.reference.fp8 import to_pages
from halfmoon.protocol.schema import KVSchema

pytestmark = pytest.mark.gpu
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
LIMIT = 5e-3


@pytest.fixture(autouse=True)
def exact_reference():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def off(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ over the finite numbers of the reference; where it is infinite, out must be."""
    finite = torch.isfinite(reference)
    assert torch.equal(torch.isfinite(out), finite)
    difference = (out.float() - reference.float())[finite]
    return float(difference.norm() / reference.float()[finite].norm())


def cache(kv_lens, kv_heads: int, head_dim: int, page_size: int, stored: torch.dtype, scales: torch.Tensor | None = None):
    """Shuffled pages and a table. bf16: NaN in pages behind a sequence's last; large numbers behind its last key in its own."""
    each = -(-max(kv_lens) // page_size)
    values = torch.randn(2, each * len(kv_lens), kv_heads, page_size, head_dim, device="cuda")
    table = torch.randperm(values.shape[1], device="cuda", dtype=torch.int32).view(len(kv_lens), each)
    if stored == E4M3:
        of = (None, None) if scales is None else scales.unbind(0)
        return torch.stack(
            [to_pages(x.transpose(1, 2), E4M3, s).transpose(1, 2).contiguous() for x, s in zip(values, of, strict=True)]
        ), table
    for row, kv_len in zip(table.long(), kv_lens, strict=True):
        values[:, row[kv_len // page_size :][:1], :, kv_len % page_size :] = 1e4
        values[:, row[-(-kv_len // page_size) :]] = math.nan
    return values.to(stored), table


def prefill(function, q, pages, table, q_lens, kv_lens, **options: Any):
    bounds = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
    lens = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    named = {"max_seqlen_q": max(q_lens), "max_kv_len": max(kv_lens), "scale": q.shape[2] ** -0.5, **options}
    return function(q, pages, table, bounds, lens, **named)


def compare_prefill(
    q_lens, kv_lens, head_dim: int = 128, heads: int = 16, kv_heads: int = 4, page_size: int = 64, stored=BF16, **options: Any
) -> None:
    pages, table = cache(kv_lens, kv_heads, head_dim, page_size, stored, options.get("kv_scales"))
    q = torch.randn(sum(q_lens), heads, head_dim, device="cuda").to(BF16)
    out, lse = prefill(flash_prefill, q, pages, table, q_lens, kv_lens, return_lse=True, **options)
    want, want_lse = prefill(prefill_in_torch.flash_prefill, q.float(), pages, table, q_lens, kv_lens, return_lse=True, **options)
    assert off(out, want) < LIMIT
    assert off(lse, want_lse) < 1e-3
    plain = prefill(flash_prefill, q, pages, table, q_lens, kv_lens, **options)  # Hopper's own kernel where it takes the call
    assert off(plain, want) < LIMIT


BATCH = ([391, 1, 700, 128], [391, 900, 1300, 640])
SCALES = torch.tensor([[0.5, 2.0, 1.0, 0.01], [3.0, 1.0, 0.1, 1.0]])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_lse_at_every_head_dim_and_page_size(head_dim: int, page_size: int) -> None:
    compare_prefill(*BATCH, head_dim=head_dim, page_size=page_size)


@pytest.mark.parametrize(
    "options", [{"sliding_window": 333}, {"logit_soft_cap": 10.0}, {"sliding_window": 64, "logit_soft_cap": 5.0, "causal": False}], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_windows_and_soft_caps(head_dim: int, options: dict[str, Any]) -> None:
    compare_prefill(*BATCH, head_dim=head_dim, **options)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scales"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_prefill_over_fp8_pages(head_dim: int, scaled: bool) -> None:
    compare_prefill(*BATCH, head_dim=head_dim, stored=E4M3, kv_scales=SCALES.cuda() if scaled else None)


@pytest.mark.parametrize("q_lens", [[2048], [100]], ids=["widened on Hopper", "keys split"])
def test_a_chunk_over_a_long_fp8_prefix(q_lens: list[int]) -> None:
    compare_prefill(q_lens, [12000], heads=32, kv_heads=4, stored=E4M3, kv_scales=SCALES.cuda())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_block_masks_of_one_head_each(head_dim: int, causal: bool) -> None:
    mask = torch.rand(4, 16, 11, 21, device="cuda") < 0.4
    mask[2, 3, 4] = False
    compare_prefill(*BATCH, head_dim=head_dim, block_mask=mask, causal=causal, sliding_window=1000)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9000}, {"logit_soft_cap": 10.0, "causal": False}], ids=str)
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([16], [30000]), ([128], [30000]), ([5, 40], [9000, 20000])], ids=str)
def test_short_chunks_over_long_prefixes_split_their_keys(
    q_lens, kv_lens, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, choose = [], portable.num_splits
    monkeypatch.setattr(portable, "num_splits", lambda *asked: splits.append(choose(*asked)) or splits[-1])
    compare_prefill(q_lens, kv_lens, heads=8, kv_heads=2, **options)
    assert splits and max(splits) > 1


@pytest.mark.parametrize(
    "shape", [(32, 8, 256, 256, 256), (32, 8, 256, 256, 1024), (32, 8, 1024, 1024, 256), (32, 8, 1024, 1024, 1024)], ids=str
)
def test_full_attention_of_the_four_shapes(shape: tuple[int, ...]) -> None:
    batch, heads, n, m, d = shape
    q_lens, kv_lens = [n] * batch, [m] * batch
    pages, table = cache(kv_lens, heads, d, 64, BF16)
    q = torch.randn(batch * n, heads, d, device="cuda").to(BF16)
    out = prefill(flash_prefill, q, pages, table, q_lens, kv_lens, causal=False)
    for s in (0, batch - 1):
        mine = slice(s * n, (s + 1) * n)
        want = prefill(prefill_in_torch.flash_prefill, q[mine].float(), pages, table[s : s + 1], [n], [m], causal=False)
        assert off(out[mine], want) < LIMIT


def test_a_wide_head_in_several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfmoon.kernels.portable import wide_prefill

    monkeypatch.setattr(wide_prefill, "WORKSPACE_BYTES", 64 << 20)
    compare_prefill([3000, 10], [5000, 700], head_dim=1024, heads=8, kv_heads=2)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 200}, {"logit_soft_cap": 10.0}], ids=str)
@pytest.mark.parametrize("stored", [BF16, E4M3], ids=["bf16", "fp8"])
@pytest.mark.parametrize("num_q", [1, 2, 4, 8, 13])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 8, 64), (8, 2, 256)])
def test_decode_of_several_tokens_as_a_graph_replayed_for_other_lengths(heads, kv_heads, head_dim, num_q, stored, options) -> None:
    lens = [1, 1000, 0, 64, 3000, 5]
    scales = torch.rand(2, kv_heads, device="cuda") + 0.5 if stored == E4M3 else None
    pages, table = cache([3000] * len(lens), kv_heads, head_dim, 64, stored, scales)
    q = torch.randn(len(lens), num_q, heads, head_dim, device="cuda").to(BF16)
    kv_lens = torch.full((len(lens),), 3000, dtype=torch.int32, device="cuda")
    named = {"max_kv_len": 3000, "scale": head_dim**-0.5, "kv_scales": scales, **options}
    paged_decode(q, pages, table, kv_lens, **named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(q, pages, table, kv_lens, **named)
    for now in (lens, [3000] * len(lens), lens[::-1]):
        kv_lens.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        want = decode_in_torch.paged_decode(q.float(), pages, table, kv_lens, **named)
        assert off(out, want) < LIMIT
        assert all(out[s].eq(0).all() for s, kv_len in enumerate(now) if kv_len == 0)


def test_both_ways_of_reading_fp8_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, table = cache([700, 2000], 4, 128, 64, E4M3)
    q, lens = torch.randn(2, 16, 128, device="cuda").to(BF16), torch.tensor([700, 2000], dtype=torch.int32, device="cuda")
    outs = []
    for way in (fp8.BY_BITS, fp8.BY_INSTRUCTION):
        if way == fp8.BY_INSTRUCTION and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("the instruction begins with sm_89")
        monkeypatch.setattr(fp8, "_way", lambda _, way=way: way)
        outs.append(paged_decode(q, pages, table, lens, max_kv_len=2000, scale=0.1))
    assert torch.equal(*outs)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scales"])
def test_fp8_pages_are_written_as_torch_rounds(scaled: bool) -> None:
    heads, kv_heads, head_dim, count = 8, 4, 128, 500
    fused = torch.randn(count, heads + 2 * kv_heads, head_dim, device="cuda").to(BF16) * 10
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.outer(torch.arange(600), 1e4 ** -(torch.arange(64) / 64)).cuda()
    positions, slots = torch.randint(0, 600, (count,), device="cuda"), torch.randperm(640, device="cuda")[:count]
    pages = [torch.zeros(2, 10, kv_heads, 64, head_dim, device="cuda").to(E4M3) for _ in range(2)]
    norm = torch.rand(head_dim, device="cuda").to(BF16) + 0.5
    for write, to in zip((kv_write, write_in_torch.kv_write), pages, strict=True):
        write(
            q,
            k,
            v,
            positions,
            torch.cat((angles.cos(), angles.sin()), 1),
            slots,
            to,
            k_norm=norm,
            kv_scales=SCALES.cuda() if scaled else None,
        )
    ours, want = (x.float() for x in pages)
    assert (ours != want).float().mean() < 1e-3  # fp32 sums in another order fall on the other side of an edge now and then
    assert ((ours - want).abs() <= 0.126 * want.abs() + 2.0**-9).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, E4M3], ids=str)
def test_pages_leave_and_come_back_as_they_were(dtype: torch.dtype) -> None:
    layer = torch.randn(2, 50, 8, 64, 128, device="cuda").to(dtype)
    pages = torch.randperm(50, device="cuda")[:33]
    blocks, other = kv_pack(layer, pages), torch.zeros_like(layer)
    assert torch.equal(blocks.view(torch.uint8), layer.view(torch.uint8)[:, pages].transpose(0, 1))
    kv_unpack(blocks, other, pages)
    assert torch.equal(other.view(torch.uint8)[:, pages], layer.view(torch.uint8)[:, pages])
    rest = [page for page in range(50) if page not in pages.tolist()]
    assert not other.view(torch.uint8)[:, rest].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_caches_blocks_go_to_the_host_and_into_another_cache(dtype: str) -> None:
    schema = KVSchema("f" * 32, dtype, 2, 8, 128, 64)
    first, second = (PagedKVCache(schema, 20, torch.device("cuda")) for _ in range(2))
    first.data.copy_(torch.randn(first.data.shape, device="cuda"))
    for layer in range(2):
        second.write_bytes(layer, [7, 3, 19], list(first.read_bytes(layer, [1, 18, 4])))
        moved, kept = second.read_blocks(layer, [7, 3, 19]), first.read_blocks(layer, [1, 18, 4])
        assert torch.equal(moved.view(torch.uint8), kept.view(torch.uint8))
        on_host = torch.from_numpy(first.read_bytes(layer, [1])).view(-1)
        assert torch.equal(on_host, first.data[layer, :, 1].contiguous().view(torch.uint8).view(-1).cpu())
