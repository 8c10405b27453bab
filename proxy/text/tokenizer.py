"""Text to token ids and back, from a model folder, with only the `tokenizers` library.

tokenizer.json         the vocabulary, the pre-tokenizer, the decoder, the tokens before a prompt (BOS; add_bos_token of
                       tokenizer_config.json is not read, as in transformers 5)
tokenizer_config.json  special tokens by name, chat_template (or chat_template.jinja beside it, which wins)
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as RustTokenizer

from ...protocol.errors import CheckpointError, InvalidRequest
from .chat_template import ChatMessage, ChatTemplate

INLINE_CHARS = 4096  # about a millisecond of encoding; a longer text goes to a thread
INLINE_TOKENS = 4096  # about a millisecond of decoding
_TURN_CHARS = 64  # rendering a turn costs as much as so many characters of text
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Thread-safe. Only the library's batch calls release the interpreter's lock, so long texts go through them, in a thread."""

    def __init__(self, backend: RustTokenizer, *, special_tokens: dict[str, Any], chat_template: ChatTemplate | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        decoder = backend.decoder.__getstate__() if backend.decoder is not None else b""
        self._byte_level = b'"ByteLevel"' in decoder
        self.is_byte_level = bool(decoder) and json.loads(decoder)["type"] == "ByteLevel"
        """decode only joins the bytes of the tokens."""
        self._decoded_bytes: dict[int, bytes] = {}
        self.byte_fallback = b'"ByteFallback"' in decoder
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.max_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters of the longest token. In byte-level tokenizers each byte is a character."""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises CheckpointError, in one line, for a file that is missing or does not parse."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}; a model folder in Hugging Face format holds one")
        try:
            backend = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception, nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        settings = read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(settings)
        source = _template_source(folder, settings)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(backend, special_tokens=special_tokens, chat_template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: what the model expects around a plain prompt; a rendered chat holds its own."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_aside(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As encode; a long text in a thread, so that the event loop goes on."""
        (token_ids,) = await self.encode_all_aside([text], add_special_tokens=add_special_tokens)
        return token_ids

    async def encode_all_aside(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """As encode_aside, for several texts. Their total length decides."""
        if sum(map(len, texts)) <= INLINE_CHARS:
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        def encode_batch() -> list[list[int]]:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]

        return await asyncio.to_thread(encode_batch)

    async def decode_aside(self, token_ids: Sequence[int]) -> str:
        """As decode, but many tokens are decoded in a thread."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.decode(token_ids)
        (text,) = await asyncio.to_thread(self._backend.decode_batch, [token_ids])
        return text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decoded_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to decode's text; none for special tokens. For byte-level tokenizers only."""
        found = self._decoded_bytes.get(token_id)
        if found is None:
            piece = None if token_id in self._special else self._backend.id_to_token(token_id)
            found = self._decoded_bytes[token_id] = _piece_bytes(piece or "")
        return found

    def is_silent(self, token_id: int) -> bool:
        """True if decode leaves it out: a special token, or an unknown id."""
        return token_id in self._special or not self._backend.id_to_token(token_id)

    async def render_chat_aside(self, messages: Sequence[ChatMessage]) -> str:
        """As render_chat, but a long chat is rendered in a thread."""
        if len(messages) * _TURN_CHARS + sum(len(message.content) for message in messages) <= INLINE_CHARS:
            return self.render_chat(messages)
        return await asyncio.to_thread(self.render_chat, messages)

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt of a chat, up to where the assistant begins. Raises InvalidRequest without a template."""
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template; send a prompt instead of messages", param="messages")
        return self.chat_template.render(messages)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; "�" stands for bytes that are only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to the text."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return _piece_bytes(piece)
        if self.byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()


def _piece_bytes(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for. A piece with any other character, as some added tokens have, is its own UTF-8."""
    byte_of_char = _byte_of_char()
    return bytes(byte_of_char[char] for char in piece) if all(char in byte_of_char for char in piece) else piece.encode()


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, backwards (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


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


def _special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """ "bos_token" -> its text; a token is a string or an object with its content."""
    found: dict[str, Any] = {}
    for name in _SPECIAL_NAMES:
        token = settings.get(name)
        text: Any = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    inline: str | list[dict[str, str]] | None = settings.get("chat_template")
    if isinstance(inline, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in inline}.get("default")
    return inline
