"""A matrix of a checkpoint, in whichever form its tensors are, as one of linears.py.

tensors of a module            form                                             becomes
weight (16 or 32 bits)         plain                                            DenseLinear
weight (F8_E4M3, I8)           compressed-tensors, fp8                          NarrowLinear    weight_scale, or weight_scale_inv by blocks
weight_packed                  compressed-tensors, pack-quantized               Int4Linear      weight_scale, weight_zero_point
qweight [in / 8, out]          GPTQ: a word is eight inputs of an output        Int4Linear      scales, qzeros [groups, ...]
qweight [in, out / 8]          AWQ: a word is eight outputs, 0 2 4 6 1 3 5 7    Int4Linear      scales, qzeros [groups, ...]

Scales of activations that a checkpoint holds are not read: each token gets its own.
"""

from __future__ import annotations

import torch

from ..kernels.reference.quantized import INT4_MIDDLE, int4_numbers
from ..protocol.errors import CheckpointError, UnsupportedArchitecture
from .linears import IN_A_WORD, DenseLinear, Int4Linear, Linear, NarrowLinear
from .quantization import Quantization
from .quantize import packed_int4
from .tensor_reader import TensorReader

NARROW_DTYPES = {"F8_E4M3": "fp8", "I8": "int8"}
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the eight outputs stand, by output."""


def read_matrix(reader: TensorReader, name: str, shape: tuple[int, int], quantization: Quantization | None) -> Linear:
    """The matrix of the module called name, [out, in], without its bias, on the CPU.

    quantization: the checkpoint's. Raises CheckpointError for a tensor that is missing or misshapen, UnsupportedArchitecture for an order
    of columns that is not their own.
    """
    if quantization is not None and quantization.kind == "int4":
        if quantization.method == "gptq" and f"{name}.qweight" in reader:
            return _gptq(reader, name, shape, quantization)
        if quantization.method == "awq" and f"{name}.qweight" in reader:
            return _awq(reader, name, shape, quantization)
        if quantization.method == "compressed-tensors" and f"{name}.weight_packed" in reader:
            return _packed(reader, name, shape, quantization)
    elif quantization is not None and NARROW_DTYPES.get(reader.dtype(f"{name}.weight")) == quantization.kind:
        return _narrow(reader, name, shape, quantization)
    reader.require(f"{name}.weight", shape)
    return DenseLinear(weight=reader.read(f"{name}.weight"))


def _narrow(reader: TensorReader, name: str, shape: tuple[int, int], quantization: Quantization) -> NarrowLinear:
    num_out, num_in = shape
    reader.require(f"{name}.weight", shape, tuple(NARROW_DTYPES))
    zeros = f"{name}.weight_zero_point"
    if zeros in reader and bool(reader.read(zeros).any()):
        raise UnsupportedArchitecture(f"{reader.folder}: {zeros} is not 0; supported are symmetric weights", tensor=zeros)
    block, row_block = quantization.group_len, quantization.row_block
    if block:
        scale = f"{name}.weight_scale_inv" if quantization.method == "fp8" else f"{name}.weight_scale"
        reader.require(scale, (-(-num_out // row_block), -(-num_in // block)))
        scales = reader.read(scale).float()
    else:
        scale = f"{name}.weight_scale"
        if reader.shape(scale) not in ((num_out, 1), (num_out,), (1,), (), (1, 1)):
            reader.require(scale, (num_out, 1))  # says what is wanted
        scales = reader.read(scale).float().reshape(-1, 1).expand(num_out, 1).contiguous()
    return NarrowLinear(weight=reader.read(f"{name}.weight"), scales=scales, group_len=block or num_in, row_block=row_block)


def _packed(reader: TensorReader, name: str, shape: tuple[int, int], quantization: Quantization) -> Int4Linear:
    num_out, num_in = shape
    group_len, num_groups = _groups(reader, name, num_in, quantization)
    _require_own_order(reader, f"{name}.weight_g_idx", group_len)
    reader.require(f"{name}.weight_packed", (num_out, num_in // IN_A_WORD), ("I32",))
    reader.require(f"{name}.weight_scale", (num_out, num_groups))
    zeros, stored = None, f"{name}.weight_zero_point"
    if reader.dtype(stored) == "I8":
        reader.require(stored, (num_out, num_groups), ("I8",))
        zeros = reader.read(stored).int() + INT4_MIDDLE
    elif stored in reader:
        reader.require(stored, (num_out // IN_A_WORD, num_groups), ("I32",))
        zeros = int4_numbers(reader.read(stored).t()).t()
    scales = reader.read(f"{name}.weight_scale")
    return Int4Linear(weight=reader.read(f"{name}.weight_packed"), scales=scales, group_len=group_len, zeros=_needed(zeros))


def _gptq(reader: TensorReader, name: str, shape: tuple[int, int], quantization: Quantization) -> Int4Linear:
    num_out, num_in = shape
    group_len, num_groups = _groups(reader, name, num_in, quantization)
    _require_own_order(reader, f"{name}.g_idx", group_len)
    reader.require(f"{name}.qweight", (num_in // IN_A_WORD, num_out), ("I32",))
    reader.require(f"{name}.qzeros", (num_groups, num_out // IN_A_WORD), ("I32",))
    reader.require(f"{name}.scales", (num_groups, num_out))
    zeros = (int4_numbers(reader.read(f"{name}.qzeros")) + quantization.zero_shift) & 15
    return Int4Linear(
        weight=reader.read(f"{name}.qweight").t().contiguous(),
        scales=reader.read(f"{name}.scales").t().contiguous(),
        group_len=group_len,
        zeros=_needed(zeros.t()),
    )


def _awq(reader: TensorReader, name: str, shape: tuple[int, int], quantization: Quantization) -> Int4Linear:
    num_out, num_in = shape
    group_len, num_groups = _groups(reader, name, num_in, quantization)
    reader.require(f"{name}.qweight", (num_in, num_out // IN_A_WORD), ("I32",))
    reader.require(f"{name}.scales", (num_groups, num_out))
    zeros = None
    if f"{name}.qzeros" in reader:
        reader.require(f"{name}.qzeros", (num_groups, num_out // IN_A_WORD), ("I32",))
        zeros = _awq_numbers(reader.read(f"{name}.qzeros")).t()
    return Int4Linear(
        weight=packed_int4(_awq_numbers(reader.read(f"{name}.qweight")).t()),
        scales=reader.read(f"{name}.scales").t().contiguous(),
        group_len=group_len,
        zeros=_needed(zeros),
    )


def _awq_numbers(packed: torch.Tensor) -> torch.Tensor:
    return int4_numbers(packed).unflatten(1, (-1, IN_A_WORD))[:, :, list(AWQ_PLACES)].flatten(1)


def _groups(reader: TensorReader, name: str, num_in: int, quantization: Quantization) -> tuple[int, int]:
    """Columns of a group, and groups of a row."""
    group_len = quantization.group_len or num_in
    if num_in % group_len or num_in % IN_A_WORD:
        raise CheckpointError(f"{reader.folder}: {name} has {num_in} columns, no multiple of 8 and of groups of {group_len}", tensor=name)
    return group_len, num_in // group_len


def _require_own_order(reader: TensorReader, name: str, group_len: int) -> None:
    """Raises UnsupportedArchitecture where columns are grouped in another order than their own."""
    if name not in reader:
        return
    found = reader.read(name).long()
    if bool((found >= 0).all()) and not torch.equal(found, torch.arange(len(found)) // group_len):
        raise UnsupportedArchitecture(
            f"{reader.folder}: {name} groups columns by their activations (desc_act, actorder), which is not supported; take a checkpoint "
            "that was made with desc_act false",
            tensor=name,
        )


def _needed(zeros: torch.Tensor | None) -> torch.Tensor | None:
    """None where all are the middle, which kernels know."""
    if zeros is None or bool((zeros == INT4_MIDDLE).all()):
        return None
    return zeros.to(torch.uint8).contiguous()
