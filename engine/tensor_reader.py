"""Reads tensors of a checkpoint's files by name, with how far it has come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from ..protocol.errors import CheckpointError
from .checkpoint import list_tensors
from .executor import Progress
from .tensor_info import TensorInfo

FLOAT_DTYPES = ("F32", "F16", "BF16")


class TensorReader:
    """Its files are open from enter to exit."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        """Raises CheckpointError as list_tensors."""
        self.folder = folder
        self._tensors = list_tensors(folder)
        self._progress = progress
        self._num_bytes_done = 0
        self._opened: dict[Path, Any] = {}
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file_order(self, names: Iterable[str]) -> list[str]:
        """Names that are there, file by file."""
        return sorted(names, key=lambda name: self._tensors[name].file)

    def dtype(self, name: str) -> str:
        """As safetensors writes it; empty: there is no such tensor."""
        return self._tensors[name].dtype if name in self._tensors else ""

    def num_bytes_of(self, names: Iterable[str]) -> int:
        """Of all tensors of the modules that these are of."""
        modules = {name.rpartition(".")[0] for name in names}
        return sum(info.num_bytes for name, info in self._tensors.items() if name.rpartition(".")[0] in modules)

    def require(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOAT_DTYPES) -> TensorInfo:
        """Raises CheckpointError that names a tensor that is missing, misshapen or of another dtype."""
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}; its config.json asks for it", tensor=name)
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: {name} has shape {list(info.shape)}; config.json asks for {list(shape)}", tensor=name)
        if info.dtype not in dtypes:
            raise CheckpointError(f"{info.file}: {name} is of dtype {info.dtype}; supported are {', '.join(dtypes)}", tensor=name)
        return info

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError where there is none."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}; its config.json asks for it", tensor=name)
        return self._tensors[name].shape

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """On the CPU. part: of it; None: all."""
        info = self._tensors[name]
        if info.file not in self._opened:
            self._opened[info.file] = self._files.enter_context(safe_open(info.file, framework="pt", device="cpu"))
        self._num_bytes_done += info.num_bytes
        opened, stored = self._opened[info.file], info.stored or name
        if info.place is not None:
            expert, first = info.place
            rows, columns = part or (slice(None), slice(None))
            return opened.get_slice(stored)[expert, _shifted(rows, first, info.shape[0]), columns]
        return opened.get_tensor(stored) if part is None else opened.get_slice(stored)[part]

    def tell(self, num_bytes: int) -> None:
        """num_bytes: of all that will be read."""
        if self._progress is not None:
            self._progress("loading weights", min(self._num_bytes_done, num_bytes), num_bytes)


def _shifted(rows: slice, first: int, num_rows: int) -> slice:
    start, stop, _ = rows.indices(num_rows)
    return slice(first + start, first + stop)
