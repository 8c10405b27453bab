"""Lists the tensors in a model folder's safetensors files from their headers only. No torch.

model.safetensors                              one file, or
model.safetensors.index.json ─► model-0000x-of-0000y.safetensors ...

file = [u64 length of header][header: JSON, tensor name -> dtype, shape, data_offsets][data]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..protocol.errors import CheckpointError
from .expert_tensors import by_expert
from .tensor_info import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that git-lfs has not fetched
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if path is missing or does not hold a JSON object."""
    refuse_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; a model folder in Hugging Face format has one") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path.parent} is a file; name the model's folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; it must hold an object")
    return found


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError where path holds a git-LFS pointer in place of the file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-LFS pointer of {path.stat().st_size} bytes and not the file itself; run `git lfs pull` in {path.parent}"
            )


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name, experts by one set of names (by_expert). Raises CheckpointError for a missing or cut file."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).exists():
        files = [SINGLE]
    else:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)} of {len(files)} files in {INDEX}; finish the download")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        tensors |= _read_header(folder / name)
    return by_expert(tensors)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    refuse_pointer(path)
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        if num_file_bytes < 8 or not 2 <= num_header_bytes <= min(MAX_HEADER_BYTES, num_file_bytes - 8):
            raise CheckpointError(f"{path} is no safetensors file ({num_file_bytes} bytes); download it again")
        try:
            header = json.loads(file.read(num_header_bytes))
            data = 8 + num_header_bytes
            tensors = {name: _tensor(path, entry, data) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has an unreadable safetensors header: {error}; download it again") from error
    end = max((info.offset + info.num_bytes for info in tensors.values()), default=data)
    if end > num_file_bytes:
        raise CheckpointError(f"{path} is cut: {num_file_bytes} bytes of {end}; finish the download")
    return tensors


def _tensor(path: Path, entry: dict[str, Any], data: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not 0 <= begin <= end or math.prod(shape) > (end - begin) * 8:
        raise ValueError(f"offsets {begin} to {end} for shape {list(shape)}")
    return TensorInfo(path, entry["dtype"], shape, data + begin, end - begin)
