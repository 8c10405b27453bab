"""What a model folder says of its special tokens and chat templates, beside tokenizer.json. Read as transformers 5 reads it.

tokenizer_config.json                     names of tokens, added_tokens_decoder, chat_template (one, or several by name)
special_tokens_map.json, added_tokens.json   of older folders: read where tokenizer_config.json has no added_tokens_decoder
chat_template.jinja, additional_chat_templates/*.jinja   where there is one, the templates of tokenizer_config.json are not read
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken

from ...protocol.errors import CheckpointError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# tokens that transformers' classes name where the folder doesn't
_CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """names: "bos_token" -> its text, for templates; a folder may have names of its own.
    absent: names that the folder gives as null.
    added: tokens that tokenizer.json may lack or may hold with other flags, in the order in which they are added.
    """

    names: dict[str, str]
    absent: frozenset[str]
    added: list[AddedToken]


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, or {} if there is no such file. Raises CheckpointError if it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; it must hold an object")
    return cast(dict[str, Any], found)


def read_special_tokens(folder: Path, vocabulary: Mapping[str, int], added: Collection[str]) -> SpecialTokens:
    """vocabulary: of tokenizer.json, with its added tokens, which are `added`."""
    settings = read_json(folder / "tokenizer_config.json")
    decoder: dict[str, Any] | None = settings.get("added_tokens_decoder")
    if decoder is None:
        settings |= read_json(folder / "special_tokens_map.json")
        older = [text for text in _by_id(read_json(folder / "added_tokens.json")) if text not in added]
        listed = [_added(text, special=text in _named(settings)) for text in older]
    else:
        listed = [_added(token) for _, token in sorted(decoder.items(), key=lambda item: int(item[0]))]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    given = {**settings, **cast(dict[str, Any], extra)} if isinstance(extra, dict) else settings
    tokens = {name: _text(value) for name, value in given.items() if name.endswith("_token")}
    defaults = {name: text for name, text in _class_tokens(folder, settings).items() if name not in tokens and text in vocabulary}
    names = defaults | {name: text for name, text in tokens.items() if text is not None}
    known = {*added, *(token.content for token in listed)}
    others = [*(given.get(name, text) for name, text in names.items()), *([] if isinstance(extra, dict) else extra)]
    listed += [_special(token) for token in others if _text(token) not in known]
    return SpecialTokens(names, frozenset(tokens.keys() - names.keys()), listed)


def read_eos_token_id(folder: Path) -> int | None:
    """The tokenizer's own. None: it has none, or tokenizer.json does not hold it."""
    found = read_json(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in found.get("added_tokens", ())}
    vocab = found.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # of a unigram model: [token, score] by id
        vocab = {token: token_id for token_id, (token, _) in enumerate(cast(list[tuple[str, float]], vocab))}
    text = read_special_tokens(folder, {**vocab, **added}, added).names.get("eos_token")
    return None if text is None else added.get(text, vocab.get(text))


def read_templates(folder: Path) -> dict[str, str]:
    """Sources by name; the one for chats without tools is "default". Empty: the model is no chat model. Raises CheckpointError."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    inline = read_json(folder / "tokenizer_config.json").get("chat_template")
    if inline is None:
        return {}
    if isinstance(inline, str):
        return {"default": inline}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in inline}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of objects with name and template"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no text: {error}") from error


def _class_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    name = settings.get("tokenizer_class") or read_json(folder / "config.json").get("tokenizer_class") or ""
    return _CLASS_TOKENS.get(str(name).removesuffix("Fast"), {})


def _named(settings: Mapping[str, Any]) -> set[str | None]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return {_text(settings.get(name)) for name in NAMES} | {_text(token) for token in extra}


def _by_id(tokens: Mapping[str, int]) -> Iterable[str]:
    return sorted(tokens, key=lambda text: tokens[text])


def _text(token: Any) -> str | None:
    """A token is a string, or an object with its content."""
    text = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special(token: Any) -> AddedToken:
    return _added({**cast(dict[str, Any], token), "special": True} if isinstance(token, dict) else token, special=True)


def _added(token: Any, *, special: bool = False) -> AddedToken:
    """special: of a token that does not say so itself."""
    if not isinstance(token, dict):
        return AddedToken(str(token), special=special, normalized=not special)
    entry = cast(dict[str, Any], token)
    flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
    return AddedToken(str(entry.get("content")), **flags)
