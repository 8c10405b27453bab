"""Quantised matrices: made to the nearest number, cut and put together as their plain ones, multiplied as what they mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.linears import DenseLinear, Int4Linear, Linear, NarrowLinear, stacked
from halfmoon.engine.quantize import packed_int4, quantize
from halfmoon.protocol.errors import ConfigError

E4M3 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(out: int, num_in: int) -> NarrowLinear:
    scales = random(-(-out // 128), -(-num_in // 128)).abs() + 0.1
    return NarrowLinear(weight=random(out, num_in).to(E4M3), scales=scales, group_len=128, row_block=128)


def int4(out: int, num_in: int, group_len: int, zeros: bool = True, dtype: torch.dtype = torch.float16) -> Int4Linear:
    numbers = torch.randint(0, 16, (out, num_in), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    shape = (out, num_in // group_len)
    middle = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8) if zeros else None
    return Int4Linear(weight=packed_int4(numbers), scales=(random(*shape).abs() + 0.1).to(dtype), zeros=middle, group_len=group_len)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """A token's numbers as fp8 or int8 have them, number by number: the largest becomes the type's largest."""
    out = torch.empty_like(x)
    for token in range(len(x)):
        scale = float(x[token].abs().max()) / (127 if kind == "int8" else 448)
        for column in range(x.shape[1]):
            value = x[token, column] / scale
            out[token, column] = scale * (torch.round(value) if kind == "int8" else value.to(E4M3).float())
    return out


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_8_bit_weights_are_the_nearest_by_row_and_so_are_the_inputs_by_token(kind):
    weight, x = random(6, 40) * torch.arange(1, 7)[:, None], random(3, 40, seed=1) * torch.tensor([[1.0], [100.0], [1e-3]])
    made = quantize(weight, kind)
    torch.testing.assert_close(made.dequantized(), rounded(weight, kind), rtol=1e-6, atol=1e-7)
    wanted = rounded(x, kind).double() @ rounded(weight, kind).double().T
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_token_of_zeros_gives_zeros():
    for kind in ("fp8", "int8", "int4"):
        assert torch.equal(quantize(random(8, 16), kind)(torch.zeros(2, 16)), torch.zeros(2, 8))


def test_blocked_weights_round_inputs_by_the_same_columns():
    made, x = blocks(200, 300), random(4, 300, seed=3) * torch.cat([torch.ones(128), torch.full((172,), 50.0)])
    parts = [slice(0, 128), slice(128, 256), slice(256, 300)]
    wanted = sum(rounded(x[:, part], "fp8").double() @ made.dequantized()[:, part].double().T for part in parts)
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("num_in", "group_len"), [(256, 128), (192, 64), (96, 32), (48, 16), (24, 8)])
def test_int4_made_at_load_is_within_half_a_step_of_each_number(num_in, group_len):
    weight = random(5, num_in) + torch.linspace(-2, 2, 5)[:, None]
    made = quantize(weight, "int4")
    assert isinstance(made, Int4Linear) and made.group_len == group_len
    grouped = weight.view(5, -1, group_len)
    step = (grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0)) / 15
    # half a step for the number, and where zero is far from the middle, as much for the zero point
    assert bool(((made.dequantized() - weight).abs().view_as(grouped) <= 1.001 * step[:, :, None]).all())
    assert float((made.dequantized() - weight).abs().mean() / step.mean()) < 0.3


def test_int4_wants_rows_of_eights():
    with pytest.raises(ConfigError, match="a matrix of 20 columns can't be int4"):
        quantize(random(4, 20), "int4")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_an_int4_product_is_that_of_what_it_means(zeros, biased):
    made, x, bias = int4(24, 64, 16, zeros), random(3, 64, seed=4), random(24, seed=5) if biased else None
    words, plain = made.weight, torch.empty(24, 64, dtype=torch.double)
    for row in range(24):
        for column in range(64):
            number = (int(words[row, column // 8]) >> (4 * (column % 8))) & 15
            zero = 8 if made.zeros is None else int(made.zeros[row, column // 16])
            plain[row, column] = (number - zero) * float(made.scales[row, column // 16])
    found = Int4Linear(weight=made.weight, scales=made.scales, zeros=made.zeros, group_len=16, bias=bias)(x)
    torch.testing.assert_close(found.double(), x.double() @ plain.T + (0 if bias is None else bias), rtol=1e-4, atol=1e-4)


def test_gate_and_up_are_multiplied():
    made, x = quantize(random(12, 64), "int4"), random(2, 64, seed=7)
    gate, up = made(x).chunk(2, dim=1)
    torch.testing.assert_close(made.gated(x), gate * torch.sigmoid(gate) * up)


CUTTABLE = {
    "dense": lambda: DenseLinear(weight=random(256, 384)),
    "fp8": lambda: quantize(random(256, 384), "fp8"),
    "int8": lambda: quantize(random(256, 384), "int8"),
    "fp8 blocks": lambda: blocks(256, 384),
    "int4": lambda: int4(256, 384, 128),
    "int4 of one group": lambda: int4(256, 384, 384, zeros=False),
}


@pytest.mark.parametrize("name", CUTTABLE)
@given(data=st.data())
def test_cuts_along_borders_mean_the_cuts_of_what_is_meant(name, data):
    made: Linear = CUTTABLE[name]()
    plain = made.dequantized()
    rows, columns = (sorted(data.draw(st.tuples(*[st.integers(0, size // 128)] * 2))) for size in plain.shape)
    top, bottom, left, right = (128 * border for border in (*rows, *columns))
    cut = made.rows(top, bottom).columns(left, right)
    assert torch.equal(cut.dequantized(), plain[top:bottom, left:right])


@pytest.mark.parametrize("name", CUTTABLE)
def test_the_parts_of_a_cut_matrix_are_it_again(name):
    made: Linear = CUTTABLE[name]()
    whole = stacked([made.rows(0, 128), made.rows(128, 256)])
    assert type(whole) is type(made) and torch.equal(whole.dequantized(), made.dequantized())
    if not isinstance(made, NarrowLinear):  # whose inputs are rounded by what of a token is there
        x = random(3, 384, seed=9)
        torch.testing.assert_close(made.columns(0, 128)(x[:, :128]) + made.columns(128, 384)(x[:, 128:]), made(x), rtol=1e-4, atol=1e-3)


def test_a_cut_inside_a_block_is_refused():
    for made in (blocks(256, 384), int4(256, 384, 128)):
        with pytest.raises(ValueError, match="columns 64 to 384 of 384 can't be cut: 128 of them share"):
            made.columns(64, 384)
    with pytest.raises(ValueError, match="rows 0 to 100 of 256"):
        blocks(256, 384).rows(0, 100)


def test_blocks_that_end_inside_a_part_are_kept_by_row():
    parts = [blocks(200, 256), blocks(40, 256)]
    whole = stacked(parts)
    assert torch.equal(whole.dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_parts_with_and_without_zero_points_go_together():
    parts = [int4(16, 64, 32, zeros=False), int4(16, 64, 32, zeros=True)]
    assert torch.equal(stacked(parts).dequantized(), torch.cat([part.dequantized() for part in parts]))
