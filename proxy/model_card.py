"""What the faces need to know of the served model: its name and limits, from the JSON files of the model folder.

The engine reads the same files in its own way (engine/model_config.py). The proxy may not import the engine and needs no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..protocol.config import ModelOptions
from ..protocol.errors import CheckpointError
from .text.tokenizer import read_json


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    """Clients use this name."""
    max_model_len: int
    """Prompt and answer together, in tokens."""
    vocab_size: int
    """Rows of the embedding. Every token id is smaller."""
    eos_token_ids: frozenset[int]
    dtype: str

    @classmethod
    def from_folder(cls, folder: Path, options: ModelOptions, dtype: str) -> ModelCard:
        """Raises CheckpointError if config.json is missing or lacks a limit."""
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"no config.json in {folder}; a model folder in Hugging Face format holds one")
        config = read_json(folder / "config.json")
        made_for = _count(config, "max_position_embeddings", folder)
        return cls(
            name=options.name or folder.resolve().name,
            max_model_len=min(options.max_model_len or made_for, made_for),
            vocab_size=_count(config, "vocab_size", folder),
            eos_token_ids=_eos_token_ids(read_json(folder / "generation_config.json"), config),
            dtype=dtype,
        )


def _count(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{folder / 'config.json'}: {key} is {value!r}; it must be a positive integer")
    return value


def _eos_token_ids(generation: dict[str, Any], config: dict[str, Any]) -> frozenset[int]:
    """From generation_config.json if it has any, because it names all the tokens that end a turn. Else from config.json."""
    found: int | list[int] | None = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])
