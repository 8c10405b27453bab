"""The matrices of a layer, each with its bias and its product: in the model's numbers, or quantised.

x [num_tokens, in] ─► Linear ─► [num_tokens, out]          gated: [gate | up] are its rows ─► silu(gate) · up, [num_tokens, out / 2]

rows() and columns() cut one, for the ranks of a group say: by output, and by input along the borders of the groups that share a scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import torch

from ..kernels.dispatch import implementation
from ..kernels.int4_linear import int4_linear
from ..kernels.linear import gated_linear, linear
from ..kernels.narrow_linear import narrow_linear
from ..kernels.reference.quantized import INT4_MIDDLE, dequantized
from ..kernels.silu_mul import silu_mul

IN_A_WORD = 8  # int4 numbers
MAX_TOKENS = 8192  # products over more go the way of this many


def size_class(num_tokens: int) -> int:
    """0 for 1 token, 1 for 2, 2 for up to 4, 3 for up to 8, and so on."""
    return (num_tokens - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One of those below. Frozen, but its tensors may be filled in place."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    ways: dict[int, str] = field(default_factory=dict, compare=False)
    """By size_class of the tokens: how the product is had, of candidates(); product_ways.py fills it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.ways.get(size_class(min(len(x), MAX_TOKENS)), ""))

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        """way: of candidates(x); empty: the likeliest."""
        raise NotImplementedError

    def candidates(self, x: torch.Tensor) -> list[str]:
        raise NotImplementedError

    @property
    def num_in(self) -> int:
        return self.weight.shape[1]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up."""
        return silu_mul(self(x))

    def rows(self, start: int, stop: int) -> Self:
        """Raises ValueError off a border."""
        raise NotImplementedError

    def columns(self, start: int, stop: int) -> Self:
        """The bias stays whole. Raises ValueError off a border."""
        raise NotImplementedError

    def dequantized(self) -> torch.Tensor:
        """fp32 [out, in]."""
        raise NotImplementedError

    def tensors(self) -> Iterator[torch.Tensor]:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                yield value

    def to(self, device: torch.device) -> Self:
        names = [each.name for each in fields(self) if isinstance(getattr(self, each.name), torch.Tensor)]
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def _cut(self, start: int, stop: int, **cut: torch.Tensor | None) -> Self:
        """Rows of weight and bias, and what else is given."""
        bias = None if self.bias is None else self.bias[start:stop]
        return dataclasses.replace(self, weight=self.weight[start:stop], bias=bias, **cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLinear(Linear):
    """weight [out, in], as torch.nn.functional.linear takes it."""

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def candidates(self, x: torch.Tensor) -> list[str]:
        return [""]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        fused = gated_linear(x, self.weight, self.bias)
        return silu_mul(self(x)) if fused is None else fused

    def cast(self, dtype: torch.dtype) -> DenseLinear:
        return dataclasses.replace(self, weight=self.weight.to(dtype))

    def rows(self, start: int, stop: int) -> DenseLinear:
        return self._cut(start, stop)

    def columns(self, start: int, stop: int) -> DenseLinear:
        return dataclasses.replace(self, weight=self.weight[:, start:stop])

    def dequantized(self) -> torch.Tensor:
        return self.weight.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowLinear(Linear):
    """weight e4m3 or int8 [out, in]; inputs become the same, with a scale a token, or a token's group where there are several groups."""

    scales: torch.Tensor  # fp32 [ceil(out / row_block), groups]
    group_len: int  # columns that share a scale
    row_block: int = 1  # rows that do

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        return narrow_linear(x, self.weight, self.scales, self.bias, row_block=self.row_block, group_len=self.group_len, way=way)

    def candidates(self, x: torch.Tensor) -> list[str]:
        return implementation("narrow_linear", x.device, "ways")(x, self.weight, self.scales)

    def rows(self, start: int, stop: int) -> NarrowLinear:
        block = self.row_block
        _require_border("rows", start, stop, len(self.weight), block)
        return self._cut(start, stop, scales=self.scales[start // block : -(-stop // block)])

    def columns(self, start: int, stop: int) -> NarrowLinear:
        weight = self.weight[:, start:stop]
        if self.scales.shape[1] == 1:
            return dataclasses.replace(self, weight=weight, group_len=stop - start)
        _require_border("columns", start, stop, self.weight.shape[1], self.group_len)
        scales = self.scales[:, start // self.group_len : -(-stop // self.group_len)]
        return dataclasses.replace(self, weight=weight, scales=scales)

    def dequantized(self) -> torch.Tensor:
        return dequantized(self.weight, self.scales, None, self.row_block, self.group_len)

    def by_rows(self) -> Self:
        """With a scale a row: blocks that end inside the matrix can't be followed by another's."""
        num_rows = len(self.weight)
        scales = self.scales.repeat_interleave(self.row_block, dim=0)[:num_rows]
        return dataclasses.replace(self, scales=scales, row_block=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Linear(Linear):
    """weight int32 [out, in / 8], the first column in the lowest four bits; inputs stay as they are."""

    scales: torch.Tensor  # [out, in / group_len], 16 or 32 bits
    group_len: int
    zeros: torch.Tensor | None = None  # uint8, as scales; None: 8 everywhere

    def product(self, x: torch.Tensor, way: str) -> torch.Tensor:
        return int4_linear(x, self.weight, self.scales, self.zeros, self.bias, group_len=self.group_len, way=way)

    def candidates(self, x: torch.Tensor) -> list[str]:
        return implementation("int4_linear", x.device, "ways")(x, self.weight, self.group_len)

    @property
    def num_in(self) -> int:
        return self.weight.shape[1] * IN_A_WORD

    def rows(self, start: int, stop: int) -> Int4Linear:
        return self._cut(start, stop, scales=self.scales[start:stop], zeros=None if self.zeros is None else self.zeros[start:stop])

    def columns(self, start: int, stop: int) -> Int4Linear:
        one_group = self.scales.shape[1] == 1
        _require_border("columns", start, stop, self.weight.shape[1] * IN_A_WORD, IN_A_WORD if one_group else self.group_len)
        weight = self.weight[:, start // IN_A_WORD : stop // IN_A_WORD]
        if one_group:
            return dataclasses.replace(self, weight=weight, group_len=stop - start)
        groups = slice(start // self.group_len, stop // self.group_len)
        zeros = None if self.zeros is None else self.zeros[:, groups]
        return dataclasses.replace(self, weight=weight, scales=self.scales[:, groups], zeros=zeros)

    def dequantized(self) -> torch.Tensor:
        return dequantized(self.weight, self.scales, self.zeros, 1, self.group_len)

    def with_zeros(self) -> Self:
        if self.zeros is not None:
            return self
        return dataclasses.replace(self, zeros=torch.full_like(self.scales, INT4_MIDDLE, dtype=torch.uint8))


def stacked(parts: Sequence[Linear]) -> Linear:
    """One whose rows are those of all parts, which are of one class."""
    if any(isinstance(part, NarrowLinear) and len(part.weight) % part.row_block for part in parts):
        parts = [part.by_rows() for part in parts if isinstance(part, NarrowLinear)]
    if any(isinstance(part, Int4Linear) and part.zeros is not None for part in parts):
        parts = [part.with_zeros() for part in parts if isinstance(part, Int4Linear)]
    names = [each.name for each in fields(parts[0]) if isinstance(getattr(parts[0], each.name), torch.Tensor)]
    return dataclasses.replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _require_border(what: str, start: int, stop: int, end: int, unit: int) -> None:
    if start % unit or (stop % unit and stop != end):
        raise ValueError(f"{what} {start} to {stop} of {end} can't be cut: {unit} of them share a scale or a word")
