"""Model folders without weights: what `load_format: dummy` needs to run a model's shape for measurement. An engine needs config.json
alone, a cluster's proxy a tokenizer, too.

python tests/benchmarks/shapes.py llama-3.1-8b FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    },
    "small": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """Raises KeyError for a shape that is not known."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=2) + "\n")
    return folder


def write_tokenizer(name: str, folder: Path) -> None:
    """A word for every token id of the shape ("t17"), so that answers have text as long as a real model's."""
    vocab = {f"t{token_id}": token_id for token_id in range(SHAPES[name]["vocab_size"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, **absent, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    sys.stdout.write(f"{write_shape(sys.argv[1], Path(sys.argv[2]))}\n")
