"""Where a tensor of a checkpoint lies. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TensorInfo(NamedTuple):
    """One tensor: its bytes are file[offset : offset + num_bytes]. dtype as safetensors writes it ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    stored: str = ""
    """Its name in the file, where that is another than the one it is listed by."""
    place: tuple[int, int] | None = None
    """A matrix that is a part of a stored tensor of three dimensions: its index in the first, and its first row in the second."""
