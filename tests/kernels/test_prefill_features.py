"""What prefill does on request: LSE, block masks, keys split among programs, head dimensions above 256. In torch, and as the Triton
kernels: in the interpreter where there is no GPU, on the GPU else."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton's first import: its own functions are decorated there
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels import flash_prefill as public  # noqa: E402
from halfmoon.kernels.portable import flash_prefill as portable  # noqa: E402
from halfmoon.kernels.portable import wide_prefill  # noqa: E402
from halfmoon.kernels.portable.block_mask import live_blocks  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
BOTH = pytest.mark.parametrize("module", [public, portable], ids=["public", "portable"])
TOLERANCE = 3e-6


def attend(module, inputs, *, block_mask: torch.Tensor | None = None, **options):
    q, pages, table, bounds, lens = (
        x.to(DEVICE) for x in (inputs.q, inputs.kv_pages, inputs.block_table, inputs.cu_seqlens_q, inputs.kv_lens)
    )
    mask = block_mask.to(DEVICE) if block_mask is not None else None
    found = module.flash_prefill(
        q, pages, table, bounds, lens, max_seqlen_q=inputs.max_seqlen_q, max_kv_len=inputs.max_kv_len, block_mask=mask, **options
    )
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


def expected(inputs, scale: float, *, window: int = 0, cap: float = 0.0, causal: bool = True, blocks: torch.Tensor | None = None):
    """out and lse in fp64; zeros and -inf where a query sees nothing."""
    outs, sums, first = [], [], 0
    for index, (k, v) in enumerate(inputs.dense):
        q_len, kv_len = int(inputs.cu_seqlens_q[index + 1]) - first, len(k)
        q = inputs.q[first : first + q_len].double()
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.double().repeat_interleave(group, 1)) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        i, j = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
        hidden = ((j > i) & causal | (window > 0) & (j <= i - window)).expand(scores.shape)
        if blocks is not None:
            rows, columns = torch.arange(q_len) // 64, torch.arange(kv_len) // 64
            hidden = hidden | ~blocks[index][:, rows][:, :, columns]
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), v.double().repeat_interleave(group, 1)))
        sums.append(scores.logsumexp(-1).T)
        first += q_len
    return torch.cat(outs), torch.cat(sums)


def close(out: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((out.double() - want).norm() / want.norm()) < tolerance


@BOTH
def test_the_lse_is_the_logarithm_of_what_the_softmax_sums(module, paged) -> None:
    inputs = paged([37, 1], [70, 33], (2, 1), 64, 16, torch.float32)
    for options, more in (({}, {}), ({"window": 20, "cap": 3.0}, {"sliding_window": 20, "logit_soft_cap": 3.0})):
        out, lse = attend(module, inputs, scale=0.3, return_lse=True, **more)
        want, want_lse = expected(inputs, 0.3, **options)
        close(out, want)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize(("head_dim", "q_lens", "kv_lens"), [(64, [80, 5], [150, 70]), (320, [5], [70])], ids=["64", "320"])
def test_a_block_mask_hides_blocks_and_a_query_that_sees_nothing_gets_zeros(module, head_dim, q_lens, kv_lens, paged) -> None:
    inputs = paged(q_lens, kv_lens, (2, 1), head_dim, 32, torch.float32)
    mask = torch.rand(len(q_lens), 2, -(-q_lens[0] // 64), -(-kv_lens[0] // 64), generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0, 1, -1] = False
    want, want_lse = expected(inputs, 0.125, window=100, blocks=mask)
    out, lse = attend(module, inputs, scale=0.125, block_mask=mask, sliding_window=100, return_lse=True)
    close(out, want)
    assert (want_lse == -torch.inf).any() and torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_one_mask_serves_all_heads(paged) -> None:
    inputs = paged([70], [70], (2, 2), 64, 16, torch.float32)
    mask = torch.tensor([[[[True, False], [False, True]]]])
    want, _ = expected(inputs, 0.125, blocks=mask.expand(-1, 2, -1, -1))
    for module in (public, portable):
        close(attend(module, inputs, scale=0.125, block_mask=mask), want)


def test_the_lists_name_live_blocks_in_order_and_leave_out_what_no_query_can_see() -> None:
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask[0, 0, 1, 2] = False
    bounds, lens = torch.tensor([0, 100], dtype=torch.int32), torch.tensor([330], dtype=torch.int32)  # queries at 230 to 329
    counts, blocks = live_blocks(mask, bounds, lens, causal=True, sliding_window=120)
    assert counts.tolist() == [[[4, 3]]]  # positions 230-293 see from 111 on; 294-329 see from 175 on
    assert blocks[0, 0, 0, :4].tolist() == [1, 2, 3, 4] and blocks[0, 0, 1, :3].tolist() == [3, 4, 5]
    counts, blocks = live_blocks(mask.expand(-1, 3, -1, -1), bounds, lens, causal=False, sliding_window=0)
    assert counts.tolist() == [[[6, 5]] * 3] and blocks[0, 2, 1, :5].tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("window", [0, 40])
def test_keys_split_among_programs_give_what_one_program_gives(window: int, paged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "num_splits", lambda *_: 3)
    inputs = paged([20, 3], [150, 9], (2, 1), 64, 16, torch.float32)
    out, lse = attend(portable, inputs, scale=0.125, sliding_window=window, return_lse=True)
    want, want_lse = expected(inputs, 0.125, window=window)
    close(out, want)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    close(
        attend(portable, inputs, scale=0.125, causal=False, sliding_window=window), expected(inputs, 0.125, window=window, causal=False)[0]
    )


def test_keys_are_split_only_where_blocks_leave_processors_idle_and_none_gets_few() -> None:
    assert portable.num_splits(132, 32768, 132) == 1
    assert portable.num_splits(67, 32768, 132) == 1
    assert portable.num_splits(32, 32768, 132) == 4
    assert portable.num_splits(8, 32768, 132) == 16
    assert portable.num_splits(8, 2048, 132) == 2
    assert portable.num_splits(8, 1000, 132) == 1
    assert portable.num_splits(1, 1 << 20, 132) == portable.MOST_SPLITS


@pytest.mark.parametrize(
    ("head_dim", "q_lens", "kv_lens", "options"),
    [(320, [35, 3], [140, 17], {"causal": False}), (1024, [5], [70], {"window": 50, "cap": 3.0})],
    ids=["320", "1024"],
)
def test_a_wide_head_is_attended_to_in_two_passes(head_dim, q_lens, kv_lens, options, paged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_prefill, "WORKSPACE_BYTES", 1)  # so that every 32 queries are a strip
    inputs = paged(q_lens, kv_lens, (2, 1), head_dim, 16, torch.float32)
    named = {"sliding_window": options.get("window", 0), "logit_soft_cap": options.get("cap", 0.0), "causal": options.get("causal", True)}
    out, lse = attend(portable, inputs, scale=head_dim**-0.5, return_lse=True, **named)
    want, want_lse = expected(inputs, head_dim**-0.5, **options)
    close(out, want)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_a_wide_head_in_fp16_is_as_exact_as_a_narrow_one(paged) -> None:
    inputs = paged([20], [140], (1, 1), 512, 16, torch.float16)
    close(attend(portable, inputs, scale=0.05), expected(inputs, 0.05)[0], 6e-4)
