"""The model that serves where none is named: a small Llama, written in Hugging Face format into a cache folder. No torch.

default_model_folder(cache_dir) ─► cache_dir/<version>/<NAME>/   config.json  model.safetensors  tokenizer.json  ...

Its weights are random, so its text is noise, and everything else about it is real: shapes, tokenizer, chat template.
A trained model takes its place by another _write_model under another NAME.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

NAME = "halfmoon-starter"
TOKENIZER_FOLDER = Path(__file__).parent / "starter_tokenizer"
SEED = 11
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
# the file whose presence says that the folder is complete is config.json: the rename brings all files at once


def default_model_folder(cache_dir: Path | None = None) -> Path:
    """The folder of the default model, made on first use and found again later.

    cache_dir: default $HALFMOON_CACHE, else $XDG_CACHE_HOME/halfmoon, else ~/.cache/halfmoon.
    """
    folder = (cache_dir or _cache_dir()) / _version() / NAME
    return folder if (folder / "config.json").exists() else make_starter_model(folder)


def make_starter_model(folder: Path) -> Path:
    """Writes the model to folder, whole or not at all, and returns folder. The same bytes every time.

    Raises FileExistsError where folder holds something else.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_model(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            # another process was first: a rename on a folder with files fails. Theirs is the same
            if not (folder / "config.json").exists():
                raise FileExistsError(f"{folder} is not empty and holds no config.json; remove it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_model(folder: Path) -> None:
    for file in TOKENIZER_FOLDER.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_tensors(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def _write_tensors(path: Path) -> None:
    """In safetensors' format (see checkpoint.py), whose library has no torch-free way that takes bfloat16."""
    generator = np.random.PCG64(SEED)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in _shapes():
        # logits of a standard deviation of 3: some tokens are clearly likelier than others, as in a trained model
        std = 3.0 / math.sqrt(shape[-1]) if name == "lm_head.weight" else 1.0 / math.sqrt(shape[-1])
        values = np.ones(shape, dtype=np.float32) if len(shape) == 1 else _uniform(generator, shape, std)
        begin = len(data)
        data += (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _shapes() -> list[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    num_q, num_kv = (CONFIG[key] * CONFIG["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    embedding = (CONFIG["vocab_size"], hidden)
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", embedding), ("lm_head.weight", embedding)]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes += [
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.self_attn.q_proj.weight", (num_q, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (num_kv, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (num_kv, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, num_q)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
        ]
    return [*shapes, ("model.norm.weight", (hidden,))]


def _uniform(generator: np.random.PCG64, shape: tuple[int, ...], std: float) -> np.ndarray:
    """fp32, made of raw bits: numpy keeps those of a bit generator the same in every version, those of normal() not."""
    raw = np.asarray(generator.random_raw(math.prod(shape))) >> np.uint64(40)
    return ((raw.astype(np.float32) * np.float32(2.0**-23) - 1.0) * np.float32(std * math.sqrt(3))).reshape(shape)


def _version() -> str:
    """Of what the model is made from: another release of Halfmoon must not serve what an earlier one left in the cache."""
    digest = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4)
    for file in sorted(TOKENIZER_FOLDER.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_dir() -> Path:
    chosen = os.environ.get("HALFMOON_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfmoon"
