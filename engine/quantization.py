"""How a checkpoint's matrices are quantised, as config.json says, and how a 16-bit checkpoint's are at load. No torch.

quantization_config ─► method, scheme ─► Quantization          what is not supported is refused by its name
Which matrices are quantised is not read here: their tensors in the files say so (quantized_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..protocol.errors import ConfigError, UnsupportedArchitecture, shown

Kind = Literal["fp8", "int8", "int4"]
Method = Literal["load", "compressed-tensors", "fp8", "gptq", "awq"]
METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
BLOCK = 128
"""Rows and columns of a matrix that share an fp8 scale where scales are by block."""
INT4_GROUP = 128
"""Columns of a row that share a scale, where int4 is made at load."""


@dataclass(frozen=True, slots=True)
class Quantization:
    kind: Kind
    method: Method
    """Who packed it: load is Halfmoon itself, from a checkpoint of 16 or 32 bits."""
    group_len: int = 0
    """Columns of a row that share a scale; 0: all of them."""
    row_block: int = 1
    """Rows that share a scale: 1, or BLOCK."""
    zero_shift: int = 0
    """What is added to a stored zero point: GPTQ's first format keeps them less 1."""

    def told(self) -> str:
        """ "int4 in groups of 128 (gptq)"."""
        sizes = {0: "by channel", BLOCK: f"in blocks of {BLOCK}" if self.row_block == BLOCK else f"in groups of {BLOCK}"}
        where = "made at load" if self.method == "load" else self.method
        return f"{self.kind} {sizes.get(self.group_len, f'in groups of {self.group_len}')} ({where})"


def made_at_load(kind: Kind) -> Quantization:
    return Quantization(kind, "load", INT4_GROUP if kind == "int4" else 0)


def int4_group(num_in: int) -> int:
    """Columns that share a scale: INT4_GROUP, or less where it does not divide a small model's rows. Raises ConfigError."""
    found = next((size for size in (INT4_GROUP, 64, 32, 16, 8) if num_in % size == 0), None)
    if found is None:
        raise ConfigError(f"a matrix of {num_in} columns can't be int4: they are no multiple of 8", key="model.quantization")
    return found


def read_quantization(path: Path, values: Mapping[str, Any]) -> Quantization:
    """values: config.json's quantization_config; path: of config.json. Raises UnsupportedArchitecture for what can't be run."""
    return _Reader(path, values).read()


class _Reader:
    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def read(self) -> Quantization:
        method = self.values.get("quant_method")
        readers = {
            "compressed-tensors": self._compressed_tensors,
            "fp8": self._fp8,
            "gptq": self._gptq,
            "awq": self._awq,
        }
        if method not in readers:
            self._refuse("quant_method", method, METHODS)
        return readers[method]()

    def _gptq(self) -> Quantization:
        self._require("bits", 4)
        self._require("pack_dtype", "int32", default="int32")
        if self.values.get("dynamic"):
            self._refuse("dynamic", self.values["dynamic"], ("one scheme for all layers",))
        form = self.values.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            self._refuse("checkpoint_format", form, ("gptq", "gptq_v2"))
        return Quantization("int4", "gptq", self._group(self.values.get("group_size")), zero_shift=1 if form == "gptq" else 0)

    def _awq(self) -> Quantization:
        self._require("bits", 4)
        version = str(self.values.get("version") or "gemm").lower()
        if version != "gemm":
            self._refuse("version", version, ("gemm",))
        return Quantization("int4", "awq", self._group(self.values.get("group_size", self.values.get("q_group_size"))))

    def _fp8(self) -> Quantization:
        self._require("fmt", "e4m3", default="e4m3")
        if (scheme := self.values.get("activation_scheme", "dynamic")) not in ("dynamic", "static"):
            self._refuse("activation_scheme", scheme, ("dynamic", "static"))
        block = self.values.get("weight_block_size")
        if block is None:
            return Quantization("fp8", "fp8")
        if list(block) != [BLOCK, BLOCK]:
            self._refuse("weight_block_size", block, (str([BLOCK, BLOCK]),))
        return Quantization("fp8", "fp8", BLOCK, BLOCK)

    def _compressed_tensors(self) -> Quantization:
        if (self.values.get("sparsity_config") or {}).get("format", "dense") != "dense":
            self._refuse("sparsity_config.format", self.values["sparsity_config"]["format"], ("dense",))
        groups = list((self.values.get("config_groups") or {}).values())
        found = {self._compressed_group(group) for group in groups}
        if len(found) != 1:
            self._refuse("config_groups", [sorted(one.told() for one in found)], ("one scheme for all layers",))
        return found.pop()

    def _compressed_group(self, group: Mapping[str, Any]) -> Quantization:
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy") or "tensor"
        scheme = f"{kind}{bits} weights by {strategy}, {_activations(inputs)} activations"
        group_size = weights.get("group_size")
        packed = (group.get("format") or self.values.get("format")) == "pack-quantized"
        by_token = (
            inputs is not None and inputs.get("num_bits") == bits and inputs.get("type", "int") == kind and inputs.get("symmetric", True)
        )
        if kind == "float" and bits == 8 and by_token:
            if strategy in ("channel", "tensor"):
                return Quantization("fp8", "compressed-tensors")
            if strategy == "block" and list(weights.get("block_structure") or ()) == [BLOCK, BLOCK]:
                return Quantization("fp8", "compressed-tensors", BLOCK, BLOCK)
        if kind == "int" and bits == 8 and strategy in ("channel", "tensor") and by_token and not packed and weights.get("symmetric", True):
            return Quantization("int8", "compressed-tensors")
        if kind == "int" and bits == 4 and strategy in ("channel", "group") and inputs is None and packed:
            return Quantization("int4", "compressed-tensors", self._group(group_size) if strategy == "group" else 0)
        supported = ("fp8 by channel, tensor or 128x128 block", "symmetric int8 (w8a8)", "pack-quantized int4 (w4a16)")
        self._refuse("scheme", scheme, supported)

    def _group(self, size: Any) -> int:
        """-1 is the whole row."""
        if size in (-1, None):
            return 0
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 8:
            self._refuse("group_size", size, ("-1", "multiples of 8"))
        return size

    def _require(self, key: str, wanted: Any, default: Any = None) -> None:
        found = self.values.get(key, default)
        if found != wanted:
            self._refuse(key, found, (str(wanted),))

    def _refuse(self, key: str, found: Any, supported: tuple[str, ...]) -> NoReturn:
        named = "" if key == "quant_method" else f"{self.values['quant_method']} with "
        raise UnsupportedArchitecture(
            f"{self.path}: the checkpoint is quantized by {named}{key} {shown(found)}; supported are {', '.join(supported)}"
        )


def _activations(inputs: Mapping[str, Any] | None) -> str:
    if inputs is None:
        return "16-bit"
    symmetric = "" if inputs.get("symmetric", True) else "asymmetric "
    return f"{symmetric}{inputs.get('type', 'int')}{inputs.get('num_bits')}"
