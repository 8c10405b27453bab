"""The bytes of each token, from the tokenizer files of a model folder. Read once, in a thread; no tokenizer is made of them.

tokenizer.json   model.vocab: token ─► its piece      decoder: what bytes a piece stands for      added_tokens: their own text, or none
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ..protocol.errors import CheckpointError, InvalidRequest
from ..protocol.token_pieces import byte_level, sentence_piece


def read_vocabulary(folder: Path, vocab_size: int) -> list[bytes]:
    """[vocab_size]; b"" for a token that adds no text: special, or unknown to the tokenizer.

    Raises InvalidRequest where the tokens are no bytes that only follow one another, CheckpointError where the file is not to be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidRequest(
            "this model's folder has no tokenizer.json, which response_format needs; leave it out", param="response_format"
        )
    try:
        tokenizer: dict[str, Any] = json.loads(path.read_bytes())
        pieces = _pieces(tokenizer["model"]["vocab"])
        decoder = _flat(tokenizer.get("decoder"))
        added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {type(error).__name__}: {error}") from error
    kinds = {one["type"] for one in decoder}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"} or kinds & {"WordPiece", "CTC", "BPEDecoder"}:
        raise InvalidRequest(
            f"this model's tokenizer decodes by {', '.join(sorted(kinds)) or 'nothing'}, and response_format needs one whose tokens are "
            "bytes; leave it out",
            param="response_format",
        )
    found = [b""] * vocab_size
    for token_id, piece in pieces:
        if token_id < vocab_size:
            found[token_id] = byte_level(piece) if "ByteLevel" in kinds else sentence_piece(piece, has_bytes="ByteFallback" in kinds)
    for token in added:
        if token["id"] < vocab_size:
            found[token["id"]] = b"" if token.get("special") else token["content"].encode()
    return found


def _pieces(vocab: Any) -> Iterator[tuple[int, str]]:
    """A mapping from piece to id, or, in Unigram, a list of (piece, score)."""
    if isinstance(vocab, dict):
        return ((token_id, piece) for piece, token_id in cast(dict[str, int], vocab).items())
    return ((token_id, entry[0]) for token_id, entry in enumerate(cast(list[tuple[str, float]], vocab)))


def _flat(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's parts, or itself."""
    if not decoder:
        return []
    return [part for inner in decoder["decoders"] for part in _flat(inner)] if decoder["type"] == "Sequence" else [decoder]
