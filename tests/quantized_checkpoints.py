"""Quantised checkpoints as their makers publish them, packed number by number, and the plain weights that they stand for.

A form takes a matrix [out, in] and gives the tensors of its module, and the matrix that these mean. It knows nothing of the engine's code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the output that a word's nibble belongs to
E4M3 = torch.float8_e4m3fn
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


class Form(NamedTuple):
    config: dict[str, Any]
    pack: Callable[[torch.Tensor], Packed]


def words(nibbles: np.ndarray) -> torch.Tensor:
    """[..., 8] of 0 to 15, lowest first -> int32 [...]."""
    value = sum(nibbles[..., index].astype(np.uint64) << np.uint64(4 * index) for index in range(8))
    return torch.from_numpy(np.asarray(value, dtype=np.uint32).view(np.int32).copy())


def nearest_int4(matrix: torch.Tensor, group: int, zeros: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """numbers [out, in], zeros and scales [out, groups], near enough to matrix."""
    out, num_in = matrix.shape
    low = matrix.view(out, -1, group).amin(2) if zeros else -matrix.view(out, -1, group).abs().amax(2)
    high = matrix.view(out, -1, group).amax(2) if zeros else -low
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 14) if zeros else torch.full_like(scale, 8)
    number = ((matrix.view(out, -1, group) / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 15).view(out, num_in)
    return number.numpy().astype(int), zero.numpy().astype(int), scale.numpy()


def meant(number: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> torch.Tensor:
    out, num_in = number.shape
    each = num_in // scale.shape[1]
    plain = np.empty((out, num_in), dtype=np.float32)
    for column in range(num_in):
        plain[:, column] = (number[:, column] - zero[:, column // each]) * scale[:, column // each]
    return torch.from_numpy(plain)


def gptq(shift: int, zeros: bool = True) -> Callable[[torch.Tensor], Packed]:
    def pack(matrix: torch.Tensor) -> Packed:
        number, zero, scale = nearest_int4(matrix, GROUP, zeros)
        out, num_in = number.shape
        tensors = {
            "qweight": words(number.T.reshape(num_in // 8, 8, out).swapaxes(1, 2)),
            "qzeros": words((zero.T - shift).reshape(-1, out // 8, 8)),
            "scales": torch.from_numpy(scale.T.copy()).half(),
            "g_idx": torch.tensor([column // GROUP for column in range(num_in)], dtype=torch.int32),
        }
        return tensors, meant(number, zero, scale)

    return pack


def awq(matrix: torch.Tensor) -> Packed:
    number, zero, scale = nearest_int4(matrix, GROUP, True)
    out, num_in = number.shape
    order = list(AWQ_ORDER)
    tensors = {
        "qweight": words(number.T.reshape(num_in, out // 8, 8)[..., order]),
        "qzeros": words(zero.T.reshape(-1, out // 8, 8)[..., order]),
        "scales": torch.from_numpy(scale.T.copy()).half(),
    }
    return tensors, meant(number, zero, scale)


def compressed_int4(zeros: bool, group: int = GROUP) -> Callable[[torch.Tensor], Packed]:
    def pack(matrix: torch.Tensor) -> Packed:
        out, num_in = matrix.shape
        number, zero, scale = nearest_int4(matrix, group or num_in, zeros)
        tensors = {
            "weight_packed": words(number.reshape(out, -1, 8)),
            "weight_scale": torch.from_numpy(scale).half(),
            "weight_shape": torch.tensor([out, num_in]),
        }
        if zeros:
            tensors["weight_zero_point"] = words(zero.reshape(out // 8, 8, -1).swapaxes(1, 2))
        return tensors, meant(number, zero, scale)

    return pack


def by_channel(dtype: torch.dtype) -> Callable[[torch.Tensor], Packed]:
    def pack(matrix: torch.Tensor) -> Packed:
        scale = matrix.abs().amax(1, keepdim=True) / (448 if dtype == E4M3 else 127)
        scaled = matrix / scale
        number = scaled.to(dtype) if dtype == E4M3 else scaled.round().to(dtype)
        return {"weight": number, "weight_scale": scale}, number.float() * scale

    return pack


def by_tensor(matrix: torch.Tensor) -> Packed:
    scale = matrix.abs().max() / 448
    number = (matrix / scale).to(E4M3)
    return {"weight": number, "weight_scale": scale.reshape(1), "input_scale": torch.ones(1)}, number.float() * scale


def by_block(name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], Packed]:
    def pack(matrix: torch.Tensor) -> Packed:
        out, num_in = matrix.shape
        scale = torch.empty(-(-out // 128), -(-num_in // 128))
        number, plain = torch.empty(matrix.shape, dtype=E4M3), torch.empty(matrix.shape)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                scale[row, column] = (matrix[place].abs().max() / 448).to(dtype)
                number[place] = (matrix[place] / scale[row, column]).to(E4M3)
                plain[place] = number[place].float() * scale[row, column]
        return {"weight": number, name: scale.to(dtype)}, plain

    return pack


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def numbers(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def inputs(bits: int, kind: str, dynamic: bool = True) -> dict[str, Any]:
    return numbers(bits, kind, "token" if dynamic else "tensor", dynamic=dynamic)


INT4, FP8, BLOCKS = numbers(4, "int", "group", group_size=GROUP), numbers(8, "float", "channel"), [128, 128]
FORMS: dict[str, Form] = {
    "gptq": Form({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}, gptq(1)),
    "gptq_v2": Form({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}, gptq(0)),
    "gptq_sym": Form({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True}, gptq(1, zeros=False)),
    "awq": Form({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "w4a16": Form(compressed(INT4, None, "pack-quantized"), compressed_int4(False)),
    "w4a16_asym": Form(compressed({**INT4, "symmetric": False}, None, "pack-quantized"), compressed_int4(True)),
    "w4a16_channel": Form(compressed(numbers(4, "int", "channel"), None, "pack-quantized"), compressed_int4(False, 0)),
    "w8a8_fp8": Form(compressed(FP8, inputs(8, "float"), "float-quantized"), by_channel(E4M3)),
    "w8a8_fp8_static": Form(compressed(numbers(8, "float", "tensor"), inputs(8, "float", False), "float-quantized"), by_tensor),
    "w8a8_fp8_block": Form(
        compressed(numbers(8, "float", "block", block_structure=BLOCKS), inputs(8, "float"), "float-quantized"),
        by_block("weight_scale", torch.bfloat16),
    ),
    "w8a8_int8": Form(compressed(numbers(8, "int", "channel"), inputs(8, "int"), "int-quantized"), by_channel(torch.int8)),
    "fp8": Form({"quant_method": "fp8", "activation_scheme": "static"}, by_tensor),
    "fp8_block": Form(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCKS},
        by_block("weight_scale_inv", torch.float32),
    ),
}
WEIGHTS_ALONE = tuple(name for name in FORMS if name.startswith(("gptq", "awq", "w4")))


def write(form: str, source: Path, folder: Path, plain_modules: tuple[str, ...] = ()) -> Path:
    """The checkpoint of source in that form, in folder/quantized; what it means, with plain weights, in folder/plain.

    plain_modules: ends of the names of modules that are left as they are.
    """
    quantized, plain = folder / "quantized", folder / "plain"
    shutil.copytree(source, quantized)
    shutil.copytree(source, plain)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    packed, means = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and name.endswith(".weight") and not module.endswith(plain_modules or ("-",)):
            made, means[name] = FORMS[form].pack(tensor)
            del packed[name]
            packed |= {f"{module}.{kind}": value.contiguous() for kind, value in made.items()}
    safetensors.torch.save_file(packed, quantized / "model.safetensors")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in means.items()}, plain / "model.safetensors")
    values = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**values, "quantization_config": FORMS[form].config}))
    return folder
