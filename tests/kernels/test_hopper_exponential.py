"""The polynomial exponential of the Hopper prefill: its PTX, as it is compiled, line by line in torch. On the GPU itself the prefill's
tests hold it (head_dim 64)."""

from __future__ import annotations

import math
import os
import re
import struct

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # as the portable kernels' tests want it, should this file be the first to import triton
pytest.importorskip("triton", reason="triton is not installed")

from halfmoon.kernels.hopper.exponential import QUARTER

Registers = dict[str, torch.Tensor]


def value(name: str, registers: Registers) -> torch.Tensor:
    if name.startswith("0f"):
        return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
    return torch.tensor(int(name), dtype=torch.int32) if name.isdigit() else registers[name]


def run(ptx: str, registers: Registers) -> Registers:
    """Every register a tensor; fp32 arithmetic is exact in fp64 and rounded once, or all but never twice."""
    for line in re.sub(r"//.*", "", ptx).strip("{}\n ").split(";"):
        if not (words := line.split(None, 1)) or words[0] == ".reg":
            continue
        to, *names = (name.strip() for name in words[1].split(","))
        given = [value(name, registers) for name in names]
        wide = [x.double() for x in given]
        match words[0]:
            case "max.f32":
                registers[to] = torch.maximum(*given)
            case "add.rn.f32":
                registers[to] = (wide[0] + wide[1]).float()
            case "sub.rn.f32":
                registers[to] = (wide[0] - wide[1]).float()
            case "fma.rn.f32":
                registers[to] = (wide[0] * wide[1] + wide[2]).float()
            case "ex2.approx.ftz.f32":
                registers[to] = wide[0].exp2().float()
            case "mov.b32":
                registers[to] = given[0].view(torch.int32)
            case "shl.b32":
                registers[to] = given[0] << given[1]
            case "add.s32":
                registers[to] = given[0] + given[1]
            case other:
                raise AssertionError(f"no meaning for {other}")
    return registers


def exponentials(x: torch.Tensor) -> list[torch.Tensor]:
    found = run(QUARTER.value, {f"${i}": x for i in range(4, 8)})
    return [found[f"${i}"].view(torch.float32) for i in range(4)]


def test_the_polynomial_is_within_its_bound_wherever_a_weight_counts() -> None:
    x = torch.cat((torch.linspace(-125.5, 0, 1_000_003), torch.arange(-125, 1).float(), torch.arange(-125, 0) + 0.5))
    exact = x.double().exp2()
    polynomial, *others = exponentials(x)
    assert float(((polynomial.double() - exact) / exact).abs().max()) < 7.5e-5
    assert all(float(((other.double() - exact) / exact).abs().max()) < 1e-6 for other in others)


def test_a_hidden_key_weighs_nothing_beside_one_that_is_seen() -> None:
    x = torch.tensor([-math.inf, -3.0e38, -1.0e30, -200.0, -127.0, -126.5, -126.0])
    for weights in exponentials(x):
        assert bool(((weights >= 0) & (weights < 1.3e-38)).all())
