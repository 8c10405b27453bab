"""What the faces need to know of the served model: its name, limits and defaults, from the JSON files of the model folder.

The engine reads the same files in its own way (engine/model_config.py). The proxy may not import the engine and needs no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..protocol.config import ModelOptions
from ..protocol.errors import CheckpointError, InvalidRequest
from ..protocol.sampling import SamplingParams
from .text.folder import read_eos_token_id, read_json

_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json, as vLLM takes them


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    """Clients use this name."""
    max_model_len: int
    """Prompt and answer together, in tokens."""
    vocab_size: int
    """Rows of the embedding. Every token id is smaller."""
    eos_token_ids: frozenset[int]
    """All that end an answer."""
    dtype: str
    other_eos_token_ids: frozenset[int] = frozenset()
    """Of those, the ones that workers don't end at by themselves."""
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """SamplingParams' fields for requests that don't have them: what generation_config.json recommends."""

    @classmethod
    def from_folder(cls, folder: Path, options: ModelOptions, dtype: str) -> ModelCard:
        """Raises CheckpointError if config.json is missing or lacks a limit, or for a recommended value that is none."""
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"no config.json in {folder}; a model folder in Hugging Face format holds one")
        config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        made_for = _made_for(config, folder)
        vocab_size = _count(config, "vocab_size", folder)
        workers_eos = _eos(generation) or _eos(config)
        others = _other_eos(folder, config, vocab_size) if options.eos == "all" else frozenset[int]()
        return cls(
            name=options.name or folder.resolve().name,
            max_model_len=min(options.max_model_len or made_for, made_for),
            vocab_size=vocab_size,
            eos_token_ids=workers_eos | others,
            dtype=dtype,
            other_eos_token_ids=others - workers_eos,
            sampling=_recommended(generation, folder) if options.generation_config == "auto" else {},
        )

    def told(self) -> str:
        """What is not OpenAI's default, in one line; "" where all is."""
        return ", ".join(f"{name} {value:g}" for name, value in self.sampling.items())


def _made_for(config: dict[str, Any], folder: Path) -> int:
    """Tokens. YaRN makes a model for `factor` times what it was trained with, whatever max_position_embeddings says."""
    given = _count(config, "max_position_embeddings", folder)
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "yarn":
        return given
    trained, factor = rope.get("original_max_position_embeddings") or given, rope.get("factor") or 1
    return max(given, int(trained * factor))


def _count(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{folder / 'config.json'}: {key} is {value!r}; it must be a positive integer")
    return value


def _eos(values: dict[str, Any]) -> frozenset[int]:
    found: int | list[int] | None = values.get("eos_token_id")
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


def _other_eos(folder: Path, config: dict[str, Any], vocab_size: int) -> frozenset[int]:
    tokenizers = read_eos_token_id(folder)
    named = _eos(config) if tokenizers is None else _eos(config) | {tokenizers}
    return frozenset(token_id for token_id in named if token_id < vocab_size)


def _recommended(generation: dict[str, Any], folder: Path) -> dict[str, Any]:
    found = {name: generation[name] for name in _RECOMMENDED if generation.get(name) is not None}
    try:
        SamplingParams(**found)
    except (InvalidRequest, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: {error}; correct it, or set model.generation_config to none"
        ) from error
    return found
