"""Turns token ids into text as they come: whole characters only, with stop strings held back and cut.

byte-level    token ─► its bytes, from a table ─► incremental UTF-8 ─┐
any other     tokens ─► window decode ─► whole characters ───────────┴─► StopStrings ─► text that can no longer change
                         │ holds a character's first bytes                │ holds a possible beginning of a stop string

`tokenizers.decoders.DecodeStream` is not used: it can't flush the tail, and it raises on bytes that never become UTF-8.
The window is that of text-generation-inference and vLLM: decode from a safe boundary twice, with and without the new
tokens. The difference is the new text, whatever the decoder does at the start of a text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol

from .tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # last tokens of the prompt, because some decoders treat a text's first token differently
_UNFINISHED = "\ufffd"  # what the bytes of an unfinished character decode to
_PATIENCE = 4  # tokens; no character has more bytes, so a longer unfinished run is not a character
_PENDING_TOKENS = 3  # an unfinished character lies within so many: it has at most 3 bytes


class Detokenizer(Protocol):
    """Invariant for tokenizers that decode byte by byte: all text returned so far + finish() == decode(all tokens)."""

    def push(self, token_id: int) -> str:
        """The characters that the token completes; "" while one is incomplete."""
        ...

    def finish(self) -> str:
        """The text still held: a replacement character for bytes that nothing completed, or ""."""
        ...


def create_detokenizer(
    tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True, shown: Collection[int] = ()
) -> Detokenizer:
    """context: the prompt's token ids. With them, a word that continues the prompt keeps its leading space.

    shown: special tokens that have text in any case.
    """
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, shown=shown)
    return WindowDetokenizer(tokenizer, context, skip_special_tokens=skip_special_tokens, shown=shown)


class ByteDetokenizer:
    """For decoders that only join bytes. It needs no context: if the prompt ends inside a character, the answer is decoded by itself."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, shown: Collection[int] = ()) -> None:
        self._bytes_of = tokenizer.decoded_bytes if skip_special_tokens else tokenizer.token_bytes
        self._shown = {token_id: tokenizer.token_bytes(token_id) for token_id in shown}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._shown.get(token_id) or self._bytes_of(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any decoder. A token costs two decodes of a few tokens, however many came before."""

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True, shown: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown = shown
        last = context[-_CONTEXT_TOKENS:]
        self._token_ids = [token_id for token_id in last if not tokenizer.is_silent(token_id)] if self._filters else list(last)
        if self._decode().endswith(_UNFINISHED):
            self._token_ids = []  # the prompt ends inside a character: the answer is decoded by itself
        self._read = len(self._token_ids)  # text of the tokens before this index was returned; the window starts at 0
        self._known = self._decode()

    def push(self, token_id: int) -> str:
        if self._skip and self._tokenizer.is_silent(token_id) and token_id not in self._shown:
            return ""
        self._token_ids.append(token_id)
        text = self._decode()
        impatient = len(self._token_ids) - self._read > _PATIENCE
        whole = not text.endswith(_UNFINISHED) or (impatient and self._tokenizer.byte_fallback)
        stable = text if whole else self._stable_part(text)
        new = stable[len(self._known) :]
        if whole and new:
            self._token_ids = self._token_ids[self._read :]
            self._read = len(self._token_ids)
            self._known = self._decode()
        elif new:
            self._known = stable
        if impatient and not whole:
            self._slide()
        return new

    def _slide(self) -> None:
        """Shortens a window that ends in an unfinished character. All of its text but the last replacement character was returned.

        The window may now begin inside a character. What that part decodes to goes into `known` and is not returned. UTF-8 is in
        step again at the next first byte of a character, and the unfinished character begins among the last _PENDING_TOKENS.
        """
        self._token_ids = self._token_ids[-_PENDING_TOKENS:]
        self._read = 0
        self._known = self._decode().removesuffix(_UNFINISHED)

    def _stable_part(self, text: str) -> str:
        """The part of text that no later token can change. The last character of text is unfinished."""
        # a byte-fallback decoder shows one replacement character per byte, and all of these become one character
        return self._known if self._tokenizer.byte_fallback else text.removesuffix(_UNFINISHED)

    def finish(self) -> str:
        text = self._decode()
        new, self._known = text[len(self._known) :], text
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip and not self._filters)

    @property
    def _filters(self) -> bool:
        """The window holds no special tokens but those that are shown."""
        return self._skip and bool(self._shown)


class StopStrings:
    """Finds the stop string that is complete first, however the text is cut. If two end together, the longer one wins.

    Text is returned as soon as no stop string can begin in it. include: the one that is found is returned, too.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._num_exempt = 0  # characters of held in which no stop string may end
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be sent: up to the stop string when one is `matched`, and nothing after it."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            out, self._held = self._held[: end if self._include else start], ""
            return out
        out, self._held = self._split(self._held)
        self._num_exempt = max(self._num_exempt - len(out), 0)
        return out

    def push_exempt(self, text: str) -> str:
        """As push, but no stop string may end in this text. One that begins in it may end after it."""
        if not self._stops:
            return text
        out, self._held = self._split(self._held + text)
        self._num_exempt = len(self._held)
        return out

    def finish(self) -> str:
        """The text held back because it might have become a stop string."""
        out, self._held = self._held, ""
        return out

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(self._num_exempt - len(stop) + 1, 0))

    def _split(self, text: str) -> tuple[str, str]:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return text[:start], text[start:]
        return text, ""
