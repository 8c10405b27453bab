"""Text to token ids and back, from a model folder, with only the `tokenizers` library.

tokenizer.json         the vocabulary, the pre-tokenizer, the decoder, the tokens before a prompt (BOS; add_bos_token of
                       tokenizer_config.json is not read, as in transformers 5)
other files            special tokens by name, tokens added to the vocabulary, chat templates: proxy/text/folder.py
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from ...protocol.config import SpecialInText
from ...protocol.errors import CheckpointError, InvalidRequest
from ...protocol.token_pieces import byte_level, sentence_piece
from .chat_template import PLAIN, ChatMessage, ChatOptions, ChatTemplate, num_chars
from .control_tokens import ControlTokens
from .folder import read_special_tokens, read_templates

INLINE_CHARS = 4096  # about a millisecond of encoding; a longer text goes to a thread
INLINE_TOKENS = 4096  # about a millisecond of decoding
_TURN_CHARS = 64  # rendering a turn costs as much as so many characters of text


class Tokenizer:
    """Thread-safe. Only the library's batch calls release the interpreter's lock, so long texts go through them, in a thread."""

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        special_tokens: dict[str, str],
        chat_templates: Mapping[str, ChatTemplate],
        special_in_text: SpecialInText = "parsed",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens
        """Names to texts."""
        self.chat_templates = chat_templates
        self._bos_token_id = backend.token_to_id(special_tokens.get("bos_token", ""))
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
        self._control_tokens = self._literal_tokens() if special_in_text == "literal" else None

    @classmethod
    def from_folder(cls, folder: Path, special_in_text: SpecialInText = "parsed") -> Tokenizer:
        """Raises CheckpointError, in one line, for a file that is missing or does not parse."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}; a model folder in Hugging Face format holds one")
        try:
            backend = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception, nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        special = read_special_tokens(folder, backend.get_vocab(with_added_tokens=True), added)
        backend.add_tokens(special.added)  # pyright: ignore[reportUnknownMemberType] - the library's own list of anything
        templates = {name: ChatTemplate(source, special.names, special.absent) for name, source in read_templates(folder).items()}
        return cls(backend, special_tokens=special.names, chat_templates=templates, special_in_text=special_in_text)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The one for chats without tools. None: the model takes no chats."""
        return self.chat_templates.get("default")

    @property
    def template_for_tools(self) -> ChatTemplate | None:
        """The one for chats with tools: as in transformers, the one of that name where there are several."""
        return self.chat_templates.get("tool_use") or self.chat_template

    def special_token_id(self, text: str) -> int | None:
        """None: the text is not exactly a special token's."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: what the model expects around a plain prompt; a rendered chat holds its own.

        A prompt that begins with the BOS that the model expects before it is not given another.
        """
        return self._with_one_bos(self._backend.encode(text, add_special_tokens=add_special_tokens).ids, add_special_tokens)

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
            return [self._with_one_bos(encoding.ids, add_special_tokens) for encoding in found]

        return await asyncio.to_thread(encode_batch)

    def _with_one_bos(self, token_ids: list[int], added: bool) -> list[int]:
        bos = self._bos_token_id
        return token_ids[1:] if added and bos is not None and token_ids[:2] == [bos, bos] else token_ids

    async def decode_aside(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As decode, but many tokens are decoded in a thread."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.decode(token_ids, skip_special_tokens=skip_special_tokens)
        (text,) = await asyncio.to_thread(self._backend.decode_batch, [token_ids], skip_special_tokens)
        return text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decoded_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to decode's text; none for special tokens. For byte-level tokenizers only."""
        found = self._decoded_bytes.get(token_id)
        if found is None:
            piece = None if token_id in self._special else self._backend.id_to_token(token_id)
            found = self._decoded_bytes[token_id] = byte_level(piece or "")
        return found

    def is_silent(self, token_id: int) -> bool:
        """True if decode leaves it out: a special token, or an unknown id."""
        return token_id in self._special or not self._backend.id_to_token(token_id)

    async def encode_chat_aside(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN) -> list[int]:
        """As encode_chat, but a long chat is rendered and encoded in a thread."""
        num_text_chars = sum(message.num_chars for message in messages) + num_chars(options.tools)
        if len(messages) * _TURN_CHARS + num_text_chars <= INLINE_CHARS:
            return self.encode_chat(messages, options)
        return await asyncio.to_thread(self.encode_chat, messages, options)

    def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN) -> list[int]:
        """A chat's prompt. Raises InvalidRequest without a template, and as the template does."""
        if self._control_tokens is not None:
            mark = self._control_tokens.mark
            messages = [message._replace(content=mark(message.content), extra=mark(dict(message.extra))) for message in messages]
            options = options._replace(variables=mark(dict(options.variables)), tools=mark(options.tools))
        text = self.render_chat(messages, options)
        if self._control_tokens is not None and self._control_tokens.has_marks(text):
            return self._control_tokens.encode(text, self._encode_parts)
        (token_ids,) = self._encode_parts([text])
        return token_ids

    def _encode_parts(self, texts: list[str]) -> list[list[int]]:
        """Of chats. A batch call lets other threads go on, and costs a short text more."""
        if sum(map(len, texts)) <= INLINE_CHARS:
            return [self.encode(text, add_special_tokens=False) for text in texts]
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def render_chat(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN) -> str:
        """The text of a chat's prompt. Raises InvalidRequest without a template, and for half a surrogate pair."""
        template = self.template_for_tools if options.tools else self.chat_template
        if template is None:
            named = f"; it has {', '.join(sorted(self.chat_templates))}" if self.chat_templates else ""
            raise InvalidRequest(f"this model has no chat template{named}; send a prompt instead of messages", param="messages")
        return require_unicode(template.render(messages, options), "messages")

    def _literal_tokens(self) -> ControlTokens:
        """The special tokens, and all others that were added and that a template writes. Blanks are text."""
        written = "".join(template.literals for template in self.chat_templates.values())
        texts = [text for token_id, text in self._added.items() if token_id in self._special or (text in written and not text.isspace())]
        return ControlTokens(texts, RustTokenizer.from_str(self._backend.to_str()))

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
            return byte_level(piece)
        return sentence_piece(piece, has_bytes=self.byte_fallback)


def require_unicode(text: str, param: str) -> str:
    """The text itself. Raises InvalidRequest for half a surrogate pair, which JSON can spell and Unicode cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} has half a surrogate pair at character {error.start}, which is no Unicode text", param=param
        ) from error
    return text
